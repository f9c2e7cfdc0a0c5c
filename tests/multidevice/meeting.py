"""Three processes that meet, as JSON: what each of them is told. Run by test_processes.py."""

import json
import sys
import time

import jax
import numpy as np
from jax.sharding import PartitionSpec

from aegis_jax.errors import AegisError
from aegis_jax.parallel import processes
from aegis_jax.parallel.mesh import make_placement


def told(function, *args):
    try:
        return function(*args)
    except AegisError as error:
        return f"{type(error).__name__}: {error}"


def fail_in(number):
    if jax.process_index() == number:
        raise FileNotFoundError(f"no file here, in {number}")
    return number


class Held:
    def __enter__(self):
        print("entered", flush=True)
        return "held"

    def __exit__(self, *exc):
        print("left", flush=True)


if __name__ == "__main__":
    processes.HEARTBEAT = 6
    processes.start()
    me = jax.process_index()
    found = {"several": processes.several(), "is_first": processes.is_first()}
    found["agreed"] = told(processes.agreed, lambda: 10 + me)
    found["one_failed"] = told(processes.agreed, lambda: fail_in(1))
    found["first"] = told(processes.first, lambda: {"by": me})
    found["first_failed"] = told(processes.first, lambda: fail_in(0))
    found["same"] = told(processes.same, "setting", {"a": 1})
    found["not_same"] = told(processes.same, "setting", {"a": 1, "b": me // 2})
    with processes.first_holds(Held) as held:
        found["held"] = held
    found["too_few"] = told(make_placement, 2, 1)
    placement = make_placement(fsdp=3)
    wide = np.arange(3 * 2**16, dtype=np.float32).reshape(3, -1)
    placed = placement.place({"wide": wide, "small": np.ones(2)})
    found["split"] = placed["wide"].sharding.spec == PartitionSpec("fsdp")
    found["held_here"] = sum(shard.data.size for shard in placed["wide"].addressable_shards)
    found["whole"] = bool((processes.on_host(placed)["wide"] == wide).all())
    print(json.dumps(found), flush=True)
    with processes.ending():
        if me == 2:
            raise AegisError("alone")
    time.sleep(600)
    sys.exit(0)
