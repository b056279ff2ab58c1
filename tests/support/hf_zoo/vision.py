"""Vision encoders; the number of positions follows from the image, so `length` of a call is the image's side."""

from __future__ import annotations

from tests.support.hf_zoo.inputs import values
from tests.support.hf_zoo.matrix import Call, Kwargs, MatrixCase
from tests.support.hf_zoo.weights import hugging_face

HIDDEN = 32
SIDE = 32
PATCH = 8


def cases() -> tuple[MatrixCase, ...]:
    """Return one case a model."""
    vit = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    swin = {
        "image_size": SIDE,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "drop_path_rate": 0.0,
    }
    plain = Call("plain", _image, _token_shapes, length=SIDE)
    return (
        MatrixCase("vit", "vision", hugging_face("ViTConfig", "ViTModel", intermediate_size=48, **vit), (plain,)),
        MatrixCase(
            "dinov2",
            "vision",
            hugging_face("Dinov2Config", "Dinov2Model", mlp_ratio=2, **vit),
            (plain, Call("resized", _image, _token_shapes, length=SIDE + 2 * PATCH)),
            "an image of another size has its position table interpolated",
        ),
        MatrixCase(
            "swin",
            "vision",
            hugging_face("SwinConfig", "SwinModel", **swin),
            (Call("plain", _image, _swin_shapes, length=SIDE),),
            "windows of 16 positions, every second layer shifted and masked; a learned bias by relative position",
        ),
    )


def _image(batch: int, length: int, seed: int) -> Kwargs:
    return {"pixel_values": values(batch, 3, length, length, seed=seed)}


def _token_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"last_hidden_state": (batch, 1 + (length // PATCH) ** 2, HIDDEN)}


def _swin_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"last_hidden_state": (batch, (length // 4) ** 2, 32)}
