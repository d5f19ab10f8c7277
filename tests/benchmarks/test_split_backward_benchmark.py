"""The benchmark of the split backward, and what it has to show."""

import pytest
import torch
from split_backward import SplitCost, block_cost, split_cost
from torch import nn


def test_the_ratio_is_of_both_halves_to_the_whole():
    assert SplitCost(1.0, 3.0, 2.0, 4.0).ratio == 1.25


def test_every_part_takes_time_and_threads_are_given_back():
    before = torch.get_num_threads()
    cost = split_cost(nn.Linear(64, 64), torch.ones(256, 64).requires_grad_(), repeats=2, warmups=1)
    assert min(cost.forward_us, cost.backward_input_us, cost.backward_weight_us, cost.fused_backward_us) > 0
    assert torch.get_num_threads() == before


def test_an_input_without_gradient_is_the_callers_mistake():
    with pytest.raises(ValueError, match="layer_input has requires_grad=False"):
        split_cost(nn.Linear(4, 4), torch.ones(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("hidden_size", [512, 768])
def test_b_and_w_together_take_no_more_cpu_time_than_bw_on_a_block(architecture, hidden_size):
    assert block_cost(architecture, hidden_size=hidden_size).ratio <= 1.03
