"""A suffix automaton of several growing texts, in which recent occurrences weigh more."""

from __future__ import annotations

_MAX_LINKS = 32  # links followed to count an occurrence, which bounds the cost of a token


class SuffixAutomaton:
    """Finds any substring of the texts seen so far in time linear in its length.

    Blumer et al., "The smallest automaton recognizing the subwords of a text", 1985; several texts at once as
    in Mohri, Moreno and Weinstein, "General suffix automaton construction algorithm and space bounds", 2009.
    A state stands for the substrings that occur at the same ends, and ``length`` is that of the longest one;
    its link leads to the longest suffix that also occurs elsewhere. State 0 is the empty string. Texts may
    grow in turns: the caller keeps each text's last state.

    Attributes:
        following: For each state, token → state.
        length: For each state, the length of its longest substring.
        link: For each state, the state it links to; -1 for state 0.
        weight: For each state, the sum of the weights with which its occurrences were added (for a substring
            that ends more than 32 links above the longest one, some occurrences are not counted).
    """

    def __init__(self) -> None:
        self.following: list[dict[int, int]] = [{}]
        self.length = [0]
        self.link = [-1]
        self.weight = [0.0]

    def __len__(self) -> int:
        return len(self.length)

    def extend(self, last: int, token: int, weight: float) -> int:
        """Appends a token to the text whose state is ``last`` and returns the text's new state."""
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
        for _ in range(_MAX_LINKS):
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
        """Moves the substrings of ``state`` that end in ``at`` + token, the shorter ones, to a new state."""
        shorter = self._add(
            dict(self.following[state]), self.length[at] + 1, self.link[state], self.weight[state]
        )
        self.link[state] = shorter
        while at >= 0 and self.following[at].get(token) == state:
            self.following[at][token] = shorter
            at = self.link[at]
        return shorter

    def settle(self, state: int, matched: int) -> int:
        """Returns the state that holds the suffix of ``matched`` tokens of ``state`` after later splits."""
        while state and matched <= self.length[self.link[state]]:
            state = self.link[state]
        return state

    def step(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """Extends a matched string by a token.

        Returns:
            The state of its longest suffix that occurs in the texts, and the length of that suffix.
        """
        state = self.settle(state, matched)
        while state and token not in self.following[state]:
            state = self.link[state]
            matched = self.length[state]
        after = self.following[state].get(token)
        return (0, 0) if after is None else (after, matched + 1)
