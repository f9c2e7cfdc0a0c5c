"""The cells that benchmarks/world_study.py runs: which settings, concepts and seeds, and how many images."""

SCREEN = {"images": 100, "evaluation_seed": 0}
FINAL = {"images": 200, "evaluation_seed": 1}
ESD = {"aet.enabled": False, "prompt.enabled": False, "grp.retention": "none"}

SETS = {
    # ESD's own learning rate first, so that AEGIS is compared with ESD at its best.
    "rate": {
        "measure": SCREEN,
        "seeds": (0,),
        "settings": {
            f"{name} lr {rate:g}": overrides | {"learning_rate": rate}
            for rate in (3e-5, 1e-4, 3e-4)
            for name, overrides in (("ESD", ESD), ("AEGIS", {}))
        },
    },
}
