"""Decide what a sampling loop does: schedules of stages (family `schedule`) and steps that are not computed (family `cache`).

One policy a file. A policy turns what is known of a denoiser (`core.schedule.Denoising`) into data, a `Schedule`; it touches no
tensor. `runtime/sampler.py` executes the data around a denoiser, `integrations/diffusers.py` inside a pipeline.
"""
