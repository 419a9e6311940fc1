"""How a gate turns logits into experts and weights."""

from typing import Literal, NamedTuple

FUNCTIONS = ("softmax", "sigmoid")


class GateConfig(NamedTuple):
    """A gate's scores, its selection and its weights. Groups are DeepSeek-V3's node-limited routing
    (arXiv:2412.19437, §2.1.2)."""

    per_token: int
    """Experts of a token (K)."""
    function: Literal["softmax", "sigmoid"] = "sigmoid"
    """Scores from logits."""
    normalise: bool = True
    """Divide the K weights by their sum."""
    scale: float = 1.0
    """Factor on the weights."""
    groups: int = 1
    """Groups of E / groups neighbouring experts."""
    groups_per_token: int = 1
    """Groups that a token may use."""
    representatives: int = 1
    """A group's rank is the sum of this many of its best scores."""

    def chooses_by_logits(self, biased: bool) -> bool:
        """Whether experts are chosen by their logits rather than by their scores.

        Scores have the order of the logits, so both choose the same in exact arithmetic. Logits
        stay exact whatever exp rounds to. Sums of scores (groups with several representatives) and
        a bias need the scores.
        """
        by_sums = self.groups_per_token < self.groups and self.representatives > 1
        return not biased and not by_sums
