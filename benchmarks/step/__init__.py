"""The parts of step_vs_pytorch: the training step by aegis_jax's programs and, twice, in PyTorch; what compares them.

Written against the step of method.md section 3 with one prefix and GRP by the hypergradient rule. Where
aegis_jax/erasure/step.py changes its order, losses or rule for omega, these must follow, and only these:

  torch_step  `_Step.step` (predictions, sign steps, goal), `_project` twice (published, tuned), `step_flops`
  jax_step    `parts`, `_update` and `gate`, which call the step's programs one by one, and `__init__` (state, settings)
  agreement   the names of the compared values (z_t, v, p, their gradients, L_e, g_e:KEY, strength:KEY) and their bounds

worker (processes, times, memory), torch_nets (UNet, text encoder) and benchmarks/cases.py (weights, draws) know nothing
of the step beyond two soft tokens v and p. tests/benchmarks counts the step's UNet evaluations.
"""
