"""Estimate how long an attention kernel takes on a target.

The work is what the mask leaves. Its rate comes from the table that `eff bench attention-table` measured (`rates.py`) where that
covers the target and the site, which makes the answer `measured`; elsewhere from the nearest measured curve or an assumed share of
the target's GEMM rate, which makes it `modelled`. Symbolic sizes are priced at `NOMINAL`.
"""

from __future__ import annotations

from effcompile.core.density import extent, visited
from effcompile.core.expr import Expr, const
from effcompile.core.kernel import Supported
from effcompile.core.mask import Mask, causal_offset, document_slot, key_padding_slot, window_left
from effcompile.core.site import AttentionSite
from effcompile.core.target import Target
from effcompile.lowering.rates import Curve, Rates, nearest_rates, power_law, rates_of

# Where nothing was measured (GPUs, and kernels that the table lacks): the share of the GEMM rate in float32 and in half precision.
_RATE = {
    "sdpa": (0.62, 0.34),
    "sdpa-causal": (0.60, 0.30),
    "dense": (0.54, 0.33),
    "padded": (0.60, 0.30),
    "blocked": (0.50, 0.28),
    "tiled": (0.70, 0.55),
    "flex": (0.44, 0.15),
    "blocks": (0.55, 0.60),
    "math": (0.20, 0.10),
}
_CALL = {
    "dense": 1.2e-5,
    "padded": 4e-5,
    "blocked": 6e-5,
    "tiled": 2e-4,
    "span": 3e-5,
    "flex": 3e-5,
    "blocks": 5e-4,
    "pages": 2e-4,
    "math": 6e-5,
}  # seconds a call costs apart from its work
_OTHER = 1e-5
_LIKE = {"span": "dense"}  # a kernel that is another one on fewer keys, behind a call of its own
_NEAREST = {"float16": "bfloat16", "float64": "float32"}  # the measured dtype whose rate stands in


def density(site: AttentionSite, block: tuple[int, int] = (256, 64)) -> float:
    """Return the share of blocks that a block-skipping kernel visits; tensors of data are taken to keep everything."""
    if not isinstance(site.mask, Mask):
        return 1.0
    return visited(site.mask.keep, extent(site.q_len), extent(site.kv_len), block)


def seconds(kind: str, site: AttentionSite, target: Target, share: float) -> float:
    """Return the time of one call that visits a `share` of all pairs."""
    return price(kind, site, target, share).seconds


def price(kind: str, site: AttentionSite, target: Target, share: float) -> Supported:
    """Return the time of one call that visits a `share` of all pairs, measured where the table covers the site."""
    found = _measured(kind, site, target, _flops(site, share))
    if found is None and kind in _LIKE:
        return Supported(seconds(_LIKE[kind], site, target, share) + _CALL[kind])
    if found is None:
        half = site.dtype in ("bfloat16", "float16")
        return Supported(_flops(site, share) / (_peak(site, target) * _RATE[kind][half]) + _CALL.get(kind, _OTHER))
    return found


def price_blocks(site: AttentionSite, target: Target, kept: float) -> Supported:
    """Return the time of the kernel of block maps that keep a share of the pairs that the mask keeps.

    The table holds the kernel at some densities (`blocks-0.1`); between them the time is a power law of the density.
    """
    share = kept * density(site, (128, 128))
    rates = nearest_rates(target.device)
    names = {
        float(name.partition("-")[2]): name
        for name, *_ in (rates.curves if rates else ())
        if name.startswith("blocks-")
    }
    found = {at: _measured(name, site, target, _flops(site, share)) for at, name in sorted(names.items())}
    known = {at: answer for at, answer in found.items() if answer is not None}
    if not known and site.q_len == 1:
        # It reads what it visits, as dense attention over so many keys does.
        return Supported(_CALL["pages"] + price("dense", site, target, share).seconds)
    if not known:
        return price("blocks", site, target, share)
    lower = max((at for at in known if at <= kept), default=min(known))
    upper = min((at for at in known if at >= kept), default=max(known))
    seconds = power_law(
        (lower, upper) if lower < upper else (lower,), (known[lower].seconds, known[upper].seconds), kept
    )
    inside = min(known) <= kept <= max(known) and known[lower].tag == known[upper].tag == "measured"
    if not inside:
        return Supported(seconds)
    return Supported(seconds, "measured", max(known[at].error or 0.0 for at in (lower, upper)))


def price_choice(policy: str, site: AttentionSite, target: Target, flops: float) -> Supported | None:
    """Return the time in which a policy's selector makes a map, whose products are `flops`; None where it was never measured."""
    return _measured(f"choose-{policy}", site, target, flops)


def _flops(site: AttentionSite, share: float) -> float:
    pairs = extent(site.batch) * extent(site.heads) * extent(site.q_len) * extent(site.kv_len)
    return 2.0 * pairs * (site.head_dim + site.value_dim) * share


def _peak(site: AttentionSite, target: Target) -> float:
    return target.device.peak(site.dtype if target.device.supports(site.dtype) else "float32")


def _measured(kind: str, site: AttentionSite, target: Target, flops: float) -> Supported | None:
    """Return the time of `flops` by the curve of a kernel, which is measured where it is this CPU's and covers the site."""
    rates = nearest_rates(target.device)
    dtype = _NEAREST.get(site.dtype, site.dtype)
    found = None if rates is None else _curve(rates, kind, dtype, site)
    if rates is None or found is None:
        return None
    curve, exact = found
    length = min(extent(site.q_len), extent(site.kv_len)) if extent(site.q_len) > 1 else extent(site.kv_len)
    rate = _peak(site, target) * rates.gemm[dtype] * curve.share(length, site.head_dim)
    time = curve.call + flops / rate
    mine = rates_of(target.device) is not None
    if mine and exact and dtype == site.dtype and curve.covers(length, site.head_dim) and _measurable(site):
        return Supported(time, "measured", curve.error)
    return Supported(time)


def _measurable(site: AttentionSite) -> bool:
    """Tell whether the table has sites of this kind: square or of one query, all sizes known, equal head dimensions."""
    sizes = (site.batch, site.heads, site.kv_heads, site.q_len, site.kv_len)
    square = site.q_len == site.kv_len or site.q_len == 1
    plain = not site.softcap and not site.sinks and not (isinstance(site.mask, Mask) and site.mask.bias is not None)
    return square and plain and site.head_dim == site.value_dim and all(isinstance(size, int) for size in sizes)


def _curve(rates: Rates, kind: str, dtype: str, site: AttentionSite) -> tuple[Curve, bool] | None:
    """Return the curve of the site's form, or that of the nearest measured one, and whether it is the site's own."""
    own = form(site)
    if kind == "math" and own not in (None, "full", "decode", "decode-mask"):
        own = "causal"  # it reads any mask as a tensor
    for name in (own, *_fallback(site)):
        if name is not None and (curve := rates.curve(kind, dtype, name)) is not None:
            return curve, name == own
    return None


def form(site: AttentionSite) -> str | None:
    """Return the form of a mask in the table's words (`causal`, `window`, ...), or None where it has none like it.

    What reads the mask as a tensor does not care what is in it, so that any opaque mask counts as `causal`.
    """
    if site.q_len == 1:
        return "decode" if isinstance(site.mask, Mask) and site.mask.is_full else "decode-mask"
    if not isinstance(site.mask, Mask):
        return "causal"
    if site.mask.is_full:
        return "full"
    words = sorted(map(_word, site.mask.parts()))
    known = {
        ("causal",): "causal",
        ("causal", "window"): "window",
        ("padding",): "padding",
        ("causal", "padding"): "causal-padding",
        ("causal", "documents"): "documents",
    }
    return known.get(tuple(words))


def _word(part: Expr) -> str:
    if causal_offset(part) == const(0):
        return "causal"
    if window_left(part) is not None:
        return "window"
    if key_padding_slot(part) is not None:
        return "padding"
    return "documents" if document_slot(part) is not None else "other"


def _fallback(site: AttentionSite) -> tuple[str, ...]:
    if site.q_len == 1:
        return ("decode-mask", "decode", "causal", "full")
    return ("window", "causal", "full", "padding") if density(site) < 0.3 else ("causal", "full", "padding")
