"""The run folder's files as somebody may have left them."""

import pytest

from aegis_jax.errors import AegisError
from aegis_jax.run.folder import RunFolder


@pytest.mark.parametrize("line", ["{", "[" * 100_000, "[]", "1"], ids=["broken", "deep", "a list", "a number"])
def test_a_line_of_the_metrics_that_is_none_of_ours(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(AegisError, match="metrics.jsonl, line 2: .*mend the line") as error:
        RunFolder(tmp_path).read_metrics()
    assert "\n" not in str(error.value)
