"""Diffusion transformers; `length` of a call counts text positions, the latent keeps its size."""

from __future__ import annotations

import torch

from tests.support.hf_zoo.inputs import padding, values
from tests.support.hf_zoo.matrix import Call, Kwargs, MatrixCase
from tests.support.hf_zoo.weights import diffusion

TEXT = 24  # width of a text position
SIDE = 8  # of the latent
FRAMES = 3


def cases() -> tuple[MatrixCase, ...]:
    """Return one case a model: one denoising step."""
    return _images() + _videos()


def _images() -> tuple[MatrixCase, ...]:
    heads = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
    pixart = diffusion(
        "PixArtTransformer2DModel",
        **heads,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=TEXT,
        sample_size=SIDE,
        use_additional_conditions=False,
    )
    sd3 = diffusion(
        "SD3Transformer2DModel",
        **heads,
        sample_size=SIDE,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    flux = diffusion(
        "FluxTransformer2DModel",
        **{**heads, "in_channels": 16},
        num_single_layers=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return (
        MatrixCase(
            "pixart",
            "diffusion",
            pixart,
            (
                Call("plain", _pixart, _wide_image, length=10),
                Call("right_pad", _pixart_padded, _wide_image, length=10, batch=3),
            ),
            "text by cross-attention; a text mask becomes a bias of -10000",
        ),
        MatrixCase(
            "sd3",
            "diffusion",
            sd3,
            (Call("plain", _sd3, _image, length=10),),
            "image and text positions attend jointly; RMSNorm on q and k; the first block has a second attention",
        ),
        MatrixCase(
            "flux",
            "diffusion",
            flux,
            (Call("plain", _flux, _packed, length=10),),
            "two double and two single blocks; interleaved rotary over three axes; SDPA called by keyword",
        ),
    )


def _videos() -> tuple[MatrixCase, ...]:
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    cogvideox = diffusion(
        "CogVideoXTransformer3DModel",
        **heads,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        sample_width=SIDE,
        sample_height=SIDE,
        sample_frames=9,
        max_text_seq_length=10,
        use_rotary_positional_embeddings=True,
    )
    wan = diffusion("WanTransformer3DModel", **heads, text_dim=TEXT, freq_dim=16, ffn_dim=48, rope_max_seq_len=32)
    return (
        MatrixCase(
            "cogvideox",
            "diffusion",
            cogvideox,
            (Call("plain", _cogvideox, _frame_stack, length=10),),
            "text and video positions in one sequence; rotary on the video part only",
        ),
        MatrixCase(
            "wan",
            "diffusion",
            wan,
            (Call("plain", _wan, _channel_stack, length=10),),
            "self and cross attention; RMSNorm over all heads; complex-valued rotary; SDPA called by keyword",
        ),
    )


def _timestep(batch: int) -> torch.Tensor:
    return torch.arange(1, batch + 1) * 100


def _pixart(batch: int, length: int, seed: int) -> Kwargs:
    return {
        "hidden_states": values(batch, 4, SIDE, SIDE, seed=seed),
        "encoder_hidden_states": values(batch, length, TEXT, seed=seed + 1),
        "timestep": _timestep(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _pixart_padded(batch: int, length: int, seed: int) -> Kwargs:
    return {**_pixart(batch, length, seed), "encoder_attention_mask": padding(batch, length, seed, "right")}


def _sd3(batch: int, length: int, seed: int) -> Kwargs:
    return {
        "hidden_states": values(batch, 4, SIDE, SIDE, seed=seed),
        "encoder_hidden_states": values(batch, length, TEXT, seed=seed + 1),
        "pooled_projections": values(batch, 16, seed=seed + 2),
        "timestep": _timestep(batch),
    }


def _flux(batch: int, length: int, seed: int) -> Kwargs:
    rows = torch.arange(SIDE // 2)
    places = (
        torch.stack(torch.meshgrid(torch.zeros_like(rows[:1]), rows, rows, indexing="ij"), dim=-1)
        .reshape(-1, 3)
        .float()
    )
    return {
        "hidden_states": values(batch, len(places), 16, seed=seed),
        "encoder_hidden_states": values(batch, length, TEXT, seed=seed + 1),
        "pooled_projections": values(batch, 16, seed=seed + 2),
        "timestep": _timestep(batch) / 1000,
        "img_ids": places,
        "txt_ids": torch.zeros(length, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def _cogvideox(batch: int, length: int, seed: int) -> Kwargs:
    angles = values(FRAMES * (SIDE // 2) ** 2, 16, seed=seed + 2)
    return {
        "hidden_states": values(batch, FRAMES, 4, SIDE, SIDE, seed=seed),
        "encoder_hidden_states": values(batch, length, TEXT, seed=seed + 1),
        "timestep": _timestep(batch),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _wan(batch: int, length: int, seed: int) -> Kwargs:
    return {
        "hidden_states": values(batch, 4, FRAMES, SIDE, SIDE, seed=seed),
        "encoder_hidden_states": values(batch, length, TEXT, seed=seed + 1),
        "timestep": _timestep(batch),
    }


def _image(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (batch, 4, SIDE, SIDE)}


def _wide_image(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (batch, 8, SIDE, SIDE)}


def _packed(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (batch, (SIDE // 2) ** 2, 16)}


def _frame_stack(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (batch, FRAMES, 4, SIDE, SIDE)}


def _channel_stack(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (batch, 4, FRAMES, SIDE, SIDE)}
