"""The part of the executor's benchmark that times the split backward, and what it has to show."""

import pytest
import torch
from executor_worker import split_block, split_ratio


def test_the_ratio_is_of_both_halves_to_the_whole():
    assert split_ratio({"B, ours": [3.0, 9.0], "W, ours": [7.0, 2.0], "BW": [4.0, 5.0]}, "ours") == 1.25


@pytest.mark.parametrize("recompute", [False, True])
def test_every_way_is_timed_after_the_warm_ups_and_after_w_only_gradients_are_left(recompute):
    found = split_block("gpt2", 64, recompute, repeats=3)
    names = {"BW", "F, whole", *(f"{part}, {way}" for part in "FBW" for way in ("ours", "torch's"))}
    assert found["times_us"].keys() == names
    assert all(len(samples) == 3 and min(samples) > 0 for samples in found["times_us"].values())
    held = found["bytes, ours"]
    assert held["B"] > 0
    assert held["W"] < held["B"]
    assert held["B"] < held["F"] or recompute


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("hidden_size", [512, 768])
def test_b_and_w_together_take_no_more_cpu_time_than_bw_on_a_block(architecture, hidden_size):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times_us = split_block(architecture, hidden_size, False, repeats=20)["times_us"]
    finally:
        torch.set_num_threads(threads)
    assert split_ratio(times_us, "ours") <= 1.03
