"""What a sampling run keeps of its references: complete, per model, in two versions, computed once."""

import threading

import pytest
from pack.nodes.video_identity.sampling import ReferenceCache


class Owner:
    pass


def test_the_cache_publishes_only_what_is_complete_and_never_another_s():
    cache, first, second = ReferenceCache(), Owner(), Owner()

    def fails():
        raise RuntimeError("stopped")

    cache.get(second, ("z",), lambda: 0)
    cache.clear()
    with pytest.raises(RuntimeError):
        cache.get(first, ("a",), fails)
    assert len(cache) == 0
    assert cache.get(first, ("a",), lambda: 1) == 1 and cache.get(first, ("a",), fails) == 1
    assert cache.get(second, ("a",), lambda: 2) == 2 and cache.get(first, ("b",), lambda: 3) == 3
    # An owner that died and another at its address: simulated, since addresses cannot be asked for.
    cache._entries[(id(second), "a")] = cache._entries[(id(first), "a")]
    assert cache.get(second, ("a",), lambda: 4) == 4
    cache.clear()
    assert len(cache) == 0 and cache.get(first, ("a",), lambda: 5) == 5


def test_the_cache_keeps_two_versions_of_a_key():
    cache, owner, filled = ReferenceCache(), Owner(), []
    for version in (1, 2, 1, 2, 3, 3, 2, 1):
        assert cache.get(owner, ("a",), lambda v=version: filled.append(v) or v, (version,)) == version
    assert filled == [1, 2, 3, 1] and len(cache) == 1


def test_the_cache_fills_once_under_threads():
    cache, owner, filled, answers = ReferenceCache(), Owner(), [], []
    start = threading.Barrier(8)

    def fill():
        filled.append(1)
        return len(filled)

    def work():
        start.wait()
        answers.append(cache.get(owner, ("a",), fill))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1 and answers == [1] * 8
