"""The parts of step_vs_pytorch: the training step by aegis_jax's programs and, twice, in PyTorch; what compares them.

Written against docs/method.md, preset `paper` with fresh latents, one prefix and v and p kept. Where
aegis_jax/erasure/aegis/step.py changes its order, losses or rule for omega, these must follow, and only these:

  torch_step  `_Step.step` (predictions, sign steps, goal), `_project` twice (published, tuned), `step_flops`
  jax_step    `_step`, which is `erase_step` with its draws replaced, and `__init__` (state, settings)
  agreement   the names of the compared values (z_a, z_b, v, p, their gradients, L_e, g_e:KEY, cosine:KEY), their bounds

worker (processes, times, memory), torch_nets (UNet, text encoder) and benchmarks/cases.py (weights, draws) know nothing
of the step beyond two latents and two soft tokens. tests/benchmarks counts the step's UNet evaluations.
"""
