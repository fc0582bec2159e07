import math

import pytest

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.defaults import BUILT_IN, choose_sampling
from vllm_mlx.generation.request import SamplingOverrides
from vllm_mlx.settings import SamplingSettings


def choose(overrides=None, settings=None, model=None, vocab_size=300):
    return choose_sampling(
        overrides or SamplingOverrides(), settings or SamplingSettings(), model or {}, vocab_size=vocab_size
    )


def test_request_beats_flag_beats_generation_config_beats_built_in():
    model = {"temperature": 0.3, "top_k": 20, "repetition_penalty": 1.05}
    settings = SamplingSettings(default_temperature=0.5, default_top_p=0.8)
    sampling, origin = choose(SamplingOverrides(temperature=0.9), settings, model)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, 0.8, 20, 0.0)
    assert [origin[n]["source"] for n in ("temperature", "top_p", "top_k", "min_p")] == [
        "request",
        "flag",
        "generation_config",
        "built-in",
    ]
    assert choose(None, settings, model)[0].temperature == 0.5
    assert choose(None, None, model)[0].temperature == 0.3
    assert choose()[0].temperature == BUILT_IN["temperature"]


def test_zero_in_the_request_is_a_value_not_an_absence():
    assert choose(SamplingOverrides(temperature=0.0), SamplingSettings(default_temperature=0.9))[0].is_greedy


def test_deterministic_overrides_the_request_and_says_so():
    sampling, origin = choose(
        SamplingOverrides(temperature=1.0, top_p=0.5, seed=7), SamplingSettings(deterministic=True)
    )
    assert sampling.is_greedy and sampling.top_p == 1.0
    assert origin["temperature"] == {"value": 0.0, "source": "deterministic"}


def test_frequency_penalty_is_openais_unless_the_mode_says_repetition():
    asked = SamplingOverrides(frequency_penalty=0.2)
    sampling, _ = choose(asked)
    assert (sampling.frequency_penalty, sampling.repetition_penalty) == (0.2, 1.0)
    sampling, origin = choose(asked, SamplingSettings(frequency_penalty_mode="repetition"))
    assert (sampling.frequency_penalty, sampling.repetition_penalty) == (0.0, 1.2)
    assert origin["repetition_penalty"]["source"] == "frequency_penalty_mode"
    both = SamplingOverrides(frequency_penalty=0.2, repetition_penalty=1.5)
    assert choose(both, SamplingSettings(frequency_penalty_mode="repetition"))[0].repetition_penalty == 1.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("min_tokens", -1),
        ("xtc_probability", 2.0),
        ("seed", 2**70),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequest) as caught:
        choose(SamplingOverrides(**{name: value}))
    assert caught.value.param == name


def test_logit_bias_must_name_tokens_of_the_model():
    assert choose(SamplingOverrides(logit_bias={5: 100.0}))[0].logit_bias == {5: 100.0}
    for bias in ({300: 1.0}, {-1: 1.0}, {1: 101.0}):
        with pytest.raises(InvalidRequest) as caught:
            choose(SamplingOverrides(logit_bias=bias))
        assert caught.value.param == "logit_bias"


def test_minus_one_turns_top_k_off():
    assert choose(SamplingOverrides(top_k=-1))[0].top_k == 0
