"""Batches side by side: order, how far ahead, errors, threads."""

import threading
import time

import pytest
import torch

from inference.pipeline import in_order, single_threads


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_thread_of_the_pool_computes_alone_and_all_others_as_before():
    numbers = in_order(lambda _: (torch.zeros(1), torch.get_num_threads())[1], range(8), single_threads(2), ahead=2)
    assert list(numbers) == [1] * 8
    assert torch.get_num_threads() == 2
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_results_come_in_order_and_a_few_ahead():
    drawn = []

    def items():
        for number in range(9):
            drawn.append(number)
            yield number

    def slow_at_first(number):
        time.sleep(0.05 if number == 0 else 0)
        return number, torch.get_num_threads()

    results = in_order(slow_at_first, items(), single_threads(2), ahead=2)
    assert drawn == []
    assert next(results) == (0, 1)
    assert drawn == [0, 1, 2]
    assert [number for number, _ in results] == list(range(1, 9))


def test_two_items_are_worked_on_at_once():
    both = threading.Barrier(2, timeout=20)
    assert list(in_order(lambda _: both.wait() >= 0, range(4), single_threads(2), ahead=2)) == [True] * 4


def test_without_a_pool_each_result_is_computed_when_it_is_asked_for():
    assert single_threads(1) is None
    computed = []
    results = in_order(lambda number: computed.append(number) or number, range(3), None, ahead=5)
    assert next(results) == 0
    assert computed == [0]
    assert list(results) == [1, 2]


def test_errors_reach_the_caller_and_what_waits_is_left():
    started = []

    def fails(number):
        started.append(number)
        time.sleep(0.02)
        raise ValueError(f"item {number}")

    with pytest.raises(ValueError, match="item 0"):
        list(in_order(fails, range(20), single_threads(2), ahead=10))
    time.sleep(0.1)
    assert len(started) < 11
