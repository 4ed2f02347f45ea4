"""The suffix drafter knows what siblings and earlier epochs said, and forgets the oldest prompts first."""

from rollout import Request
from rollout.drafters import DraftContext, SuffixDrafter
from rollout.sequence import SequenceState


def sequence(tokens, group, prompt=2):
    s = SequenceState(Request(tokens[:prompt], group=group), 0, 100)
    s.tokens = list(tokens)
    return s


def draft(drafter, s, depth=4):
    tree = drafter.propose(DraftContext([s], None), depth)
    return tree.tokens[0, : tree.lengths[0]].tolist()


def test_continues_a_siblings_text():
    drafter = SuffixDrafter()
    drafter.observe(sequence([1, 2, 3, 4, 5, 6, 7], "g"), 7)
    assert draft(drafter, sequence([1, 2, 9, 3, 4], "g")) == [5, 6, 7]
    assert draft(drafter, sequence([1, 2, 9, 3, 4], "other")) == []
    assert draft(drafter, sequence([1, 2, 9, 3, 4], None)) == []


def test_longest_match_wins_then_the_most_frequent():
    drafter = SuffixDrafter()
    for text in ([0, 0, 8, 5, 6, 1], [0, 0, 8, 5, 6, 1], [0, 0, 7, 4, 5, 6, 2]):
        drafter.observe(sequence(text, "g"), len(text))
    assert draft(drafter, sequence([3, 3, 5, 6], "g"), depth=1) == [1]
    assert draft(drafter, sequence([3, 7, 4, 5, 6], "g"), depth=1) == [2]


def test_own_text_counts_and_the_prompt_counts_once():
    drafter = SuffixDrafter()
    s = sequence([1, 2, 3], "g", prompt=3)
    drafter.observe(s, 3)
    before = drafter._entries
    drafter.observe(sequence([1, 2, 3], "g", prompt=3), 3)
    assert drafter._entries == before
    assert draft(drafter, sequence([9, 1, 2], "g"), depth=1) == [3]


def test_memory_is_bounded_by_dropping_the_oldest_prompt():
    drafter = SuffixDrafter(max_entries=60)
    for group in range(10):
        drafter.observe(sequence([group * 20 + i for i in range(15)], group), 15)
    assert drafter._entries <= 60
    assert draft(drafter, sequence([180, 181], 9)) == [182, 183, 184, 185]
    assert draft(drafter, sequence([0, 1], 0)) == []
