"""Give small pipelines of diffusers with random weights, and what to call them with: no text encoder, embeddings in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae() -> Any:
    """Return an autoencoder that shrinks edges by 4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def sd3(**scheduler: Any) -> tuple[Any, dict[str, Any]]:
    """Return Stable Diffusion 3 and its arguments, for 64 x 64 pixels: latents of 16 x 16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    ).eval()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(),
        **dict.fromkeys(
            ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"), None
        ),
    )
    return quiet(pipe), {
        "prompt_embeds": normal(1, 6, 16),
        "negative_prompt_embeds": normal(1, 6, 16, seed=1),
        "pooled_prompt_embeds": normal(1, 16, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 16, seed=3),
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }


def flux() -> tuple[Any, dict[str, Any]]:
    """Return FLUX and its arguments, for 64 x 48 pixels: latents of 16 x 12, in 8 x 6 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), None),
    )
    return quiet(pipe), {
        "prompt_embeds": normal(1, 6, 16),
        "pooled_prompt_embeds": normal(1, 16, seed=2),
        "height": 64,
        "width": 48,
        "output_type": "latent",
    }


def pixart() -> tuple[Any, dict[str, Any]]:
    """Return PixArt with DDIM and its arguments, for 64 x 64 pixels; its transformer predicts a variance too."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        cross_attention_dim=32,
        caption_channels=16,
        norm_type="ada_norm_single",
        norm_num_groups=4,
        use_additional_conditions=False,
    ).eval()
    pipe = PixArtAlphaPipeline(
        transformer=transformer,
        scheduler=DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
    )
    return quiet(pipe), {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": normal(1, 6, 16),
        "prompt_attention_mask": torch.ones(1, 6),
        "negative_prompt_embeds": normal(1, 6, 16, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 6),
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
        "output_type": "latent",
    }


def quiet(pipe: Any) -> Any:
    """Return the pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
