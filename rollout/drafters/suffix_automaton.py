"""A suffix automaton of several growing texts, with recent occurrences weighing more."""

from __future__ import annotations

_MOST_LINKS = 32


class SuffixAutomaton:
    """All substrings of the texts seen so far, each found in time linear in its length.

    Blumer et al., "The smallest automaton recognizing the subwords of a text", 1985; several texts at once as
    Mohri, Moreno and Weinstein, "General suffix automaton construction algorithm and space bounds", 2009. A
    state stands for the substrings that occur at the same ends, ``length`` is that of the longest; its link
    leads to the longest suffix that also occurs elsewhere.
    State 0 is the empty string. Texts may grow in turns: the caller keeps each one's last state.

    Attributes:
        following: For each state, token → state.
        length: For each state.
        link: For each state; -1 for state 0.
        weight: For each state, sum over occurrences of the weight they were added with (of a substring that
            ends more than 32 links above the longest one, some are left out).
    """

    def __init__(self) -> None:
        self.following: list[dict[int, int]] = [{}]
        self.length = [0]
        self.link = [-1]
        self.weight = [0.0]

    def __len__(self) -> int:
        return len(self.length)

    def extend(self, last: int, token: int, weight: float) -> int:
        """Appends a token to the text whose state is ``last``. Returns the text's new state."""
        following, length, link = self.following, self.length, self.link
        known = following[last].get(token)
        if known is not None:
            state = known if length[known] == length[last] + 1 else self._split(last, token, known)
        else:
            state = self._add({}, length[last] + 1, 0, 0.0)
            at = last
            while at >= 0 and token not in following[at]:
                following[at][token] = state
                at = link[at]
            if at >= 0:
                target = following[at][token]
                link[state] = target if length[target] == length[at] + 1 else self._split(at, token, target)
        at = state
        for _ in range(_MOST_LINKS):
            if at <= 0:
                break
            self.weight[at] += weight
            at = link[at]
        return state

    def _add(self, following: dict[int, int], length: int, link: int, weight: float) -> int:
        self.following.append(following)
        self.length.append(length)
        self.link.append(link)
        self.weight.append(weight)
        return len(self.length) - 1

    def _split(self, at: int, token: int, state: int) -> int:
        """Gives the shorter substrings of ``state``, those that end in ``at`` + token, a state of their
        own.
        """
        shorter = self._add(
            dict(self.following[state]), self.length[at] + 1, self.link[state], self.weight[state]
        )
        self.link[state] = shorter
        while at >= 0 and self.following[at].get(token) == state:
            self.following[at][token] = shorter
            at = self.link[at]
        return shorter

    def settle(self, state: int, matched: int) -> int:
        """The state of the suffix of ``matched`` tokens that was in ``state`` before later splits."""
        while state and matched <= self.length[self.link[state]]:
            state = self.link[state]
        return state

    def step(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """The longest suffix of a matched string and a further token that occurs, and its length."""
        state = self.settle(state, matched)
        while state and token not in self.following[state]:
            state = self.link[state]
            matched = self.length[state]
        after = self.following[state].get(token)
        return (0, 0) if after is None else (after, matched + 1)
