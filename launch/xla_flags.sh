# . launch/xla_flags.sh gpu|tpu
#
# For one `aegis erase` over several devices, fsdp above all: adds to XLA_FLAGS (GPU) or LIBTPU_INIT_ARGS (TPU) what lets
# communication run beside computation. Flags that are set already stay as they are. A single device, and `aegis batch`,
# communicate nothing and gain nothing. What they gain elsewhere has not been measured for aegis_jax: compare the steps
# a second of a run with and without them before you keep them.
# shellcheck shell=bash

_aegis_add() { # variable, flag: unless the variable has that flag already
  [[ " ${!1-} " == *" ${2%%=*}="* ]] || export "$1=${!1:+${!1} }$2"
}

case ${1-} in
  gpu)
    # Moves the start of a collective up and its end down, so that kernels run meanwhile. One of the few that JAX's own page
    # names (docs.jax.dev, "GPU performance tips"), and the one that NVIDIA sets in its JAX images (JAX-Toolbox,
    # "Environment Variables").
    _aegis_add XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true
    ;;
  tpu)
    # All from the table of JAX's page "XLA compiler flags" (docs.jax.dev), which fsdp training in MaxText sets together.
    # All-gathers, by which fsdp brings weights together, become a start and a done with work between them,
    _aegis_add LIBTPU_INIT_ARGS --xla_enable_async_all_gather=true
    # that work is compiled into one with them,
    _aegis_add LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion=true
    _aegis_add LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    # over several such pieces where one is too short,
    _aegis_add LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion_multiple_steps=true
    # and runs on the same TensorCore meanwhile.
    _aegis_add LIBTPU_INIT_ARGS --xla_tpu_overlap_compute_collective_tc=true
    ;;
  *)
    echo "usage: . launch/xla_flags.sh gpu|tpu" >&2
    unset -f _aegis_add
    return 2
    ;;
esac
unset -f _aegis_add
