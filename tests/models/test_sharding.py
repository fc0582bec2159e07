"""What cannot be shared out among processes is refused in one sentence. One process, which is a group of one."""

from __future__ import annotations

import pytest

from vllm_mlx.errors import ModelLoadError
from vllm_mlx.models.json_file import read_json
from vllm_mlx.models.loader import load, read_profile
from vllm_mlx.models.sharding import splitter


class Group:
    """So many processes, of which this is the first."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [("qwen3", "pipeline", "no pipeline split"), ("mamba2", "tensor", "no tensor split")],
)
def test_a_model_that_has_no_such_split_is_refused_with_the_other_one_named(tiny_model, name, kind, words) -> None:
    folder = tiny_model(name)
    split = splitter(kind, read_profile(folder), read_json(folder / "config.json"))
    with pytest.raises(ModelLoadError, match=words) as error:
        load(folder, split=split)
    assert "--distributed" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "words"), [(3, "num_attention_heads 4, which 3"), (4, "num_key_value_heads 2, which 4")]
)
def test_heads_that_the_processes_cannot_share_evenly_are_refused_with_the_numbers(tiny_model, size, words) -> None:
    folder = tiny_model("qwen3")
    with pytest.raises(ModelLoadError, match=f"{words} processes cannot share evenly"):
        splitter("tensor", read_profile(folder), read_json(folder / "config.json"), Group(size))
