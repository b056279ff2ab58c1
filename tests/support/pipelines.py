"""Give small pipelines of diffusers with random weights, and what to call them with: no text encoder, embeddings in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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


def cogvideox(rotary: bool = True) -> tuple[Any, dict[str, Any]]:
    """Return CogVideoX, with rotations (5B) or without (2B), and its arguments, for 9 frames of 128 x 96 pixels: 3 of 16 x 12."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=2,
        sample_width=12,
        sample_height=16,
        sample_frames=9,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=rotary,
    ).eval()
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=True,
    )
    pipe = CogVideoXPipeline(None, None, None, transformer, scheduler)
    return quiet(pipe), {**_prompts(), "num_frames": 9, "height": 128, "width": 96, "output_type": "latent"}


def wan() -> tuple[Any, dict[str, Any]]:
    """Return Wan and its arguments, for 9 frames of 128 x 128 pixels: 3 of 16 x 16; guidance calls the transformer twice."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=5.0), transformer)
    return quiet(pipe), {**_prompts(), "num_frames": 9, "height": 128, "width": 128, "output_type": "latent"}


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    """Return HunyuanVideo and its arguments, for 9 frames of 128 x 128 pixels: 3 of 16 x 16; guidance is an embedding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    pipe = HunyuanVideoPipeline(None, None, transformer, None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)
    return quiet(pipe), {
        "prompt_embeds": normal(1, 6, 16),
        "pooled_prompt_embeds": normal(1, 16, seed=2),
        "prompt_attention_mask": torch.ones(1, 6),
        "num_frames": 9,
        "height": 128,
        "width": 128,
        "output_type": "latent",
    }


def _prompts() -> dict[str, Tensor]:
    return {"prompt_embeds": normal(1, 6, 16), "negative_prompt_embeds": normal(1, 6, 16, seed=1)}


def unet(**more: Any) -> Any:
    """Return a UNet of two resolutions, with attention in the lower one."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    ).eval()


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    """Return Stable Diffusion with trailing DDIM and its arguments, for 64 x 64 pixels: latents of 16 x 16."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"), None)
    pipe = StableDiffusionPipeline(unet=unet(), vae=vae(), scheduler=scheduler, requires_safety_checker=False, **parts)
    return quiet(pipe), {**_prompts(), "height": 64, "width": 64, "output_type": "latent"}


def sdxl() -> tuple[Any, dict[str, Any]]:
    """Return Stable Diffusion XL with trailing DDIM and its arguments, for 64 x 64 pixels: its UNet is told the sizes."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), None)
    told = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }
    pipe = StableDiffusionXLPipeline(unet=unet(**told), vae=vae(), scheduler=scheduler, add_watermarker=False, **parts)
    more = {"pooled_prompt_embeds": normal(1, 16, seed=2), "negative_pooled_prompt_embeds": normal(1, 16, seed=3)}
    return quiet(pipe), {**_prompts(), **more, "height": 64, "width": 64, "output_type": "latent"}


def sample(pipe: Any, given: dict[str, Any], steps: int = 5, seed: int = 0, **more: Any) -> Any:
    """Return what a pipeline makes: images or frames."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(**given, num_inference_steps=steps, generator=generator, return_dict=False, **more)[0]


def shapes(inner: nn.Module) -> list[tuple[int, ...]]:
    """Return a list that gets the shape of each call's latents."""
    seen: list[tuple[int, ...]] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(tuple((kwargs.get("hidden_states") if "hidden_states" in kwargs else args[0]).shape))

    inner.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def quiet(pipe: Any) -> Any:
    """Return the pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
