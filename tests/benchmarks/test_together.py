from benchmarks import cells, together

ABOUT = {"date": "2026-01-01", "cores": 2, "cpu": "some", "revision": "abc", "versions": {"jax": "0"}}


def test_cells_are_of_their_settings():
    one, four = together.grid([1, 4], ["aegis+"])
    assert one["concept"] == "star" and four["concept"] == "star,red,striped,heart" and one["of"] != four["of"]
    assert together.settings(one).erase.steps == 500 and together.settings(four).erase.steps == 1000
    assert together.settings(together.grid([8], ["uce"])[0]).erase.steps == 1
    (longer,) = together.grid([4], ["aegis+"], 500)
    assert together.settings(longer).erase.steps == 2000 and cells.key(longer) != cells.key(four)
    assert len({cells.key(cell) for cell in together.grid()}) == len(together.COUNTS) * len(together.PRESETS)


def test_the_table_has_means_and_each():
    rates = lambda share: {"strongest": share, "worst_pick": share, "pick": share / 2}  # noqa: E731
    figures = {"kept": 0.96, "steps": 1000, "plain": 0.05, "plain_worst": 0.1, "held_out": 0.0, "held_out_worst": 0.0}
    figures["each"] = {"star": rates(0.2), "red": rates(0.4)}
    cell = together.grid([4], ["aegis+"])[0]
    text = together.table([{"cell": cell, "figures": figures, "seconds": 60, "about": ABOUT}])
    assert text.splitlines()[-1] == (
        "| 4 | aegis+ | 1000 | 5 / 10 | 0 / 0 | 96 | 30 (20, 40) | 30 (20, 40) | 15 (10, 20) |"
    )
