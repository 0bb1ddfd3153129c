# SPDX-License-Identifier: Apache-2.0
"""A tree for each request and step, grown level by level where what is said of a node's children depends on its path.

Probabilities are then not known beforehand. At each depth the most probable nodes, the beam, are asked for their
children; of all nodes so found the most probable ones make the tree. A path's probability is the product of its
tokens', each given the path before it. It falls along the path, so every parent comes before its children. Against the
best tree of as many nodes only children of nodes outside the beam can be missing. All shapes are fixed, but where
levels are left out (``least_parent``).
"""

from __future__ import annotations

import copy
import math

import torch
from torch.nn.functional import pad

from vllm_medusa.tree.candidates import grow_trees
from vllm_medusa.tree.drafts import Drafts
from vllm_medusa.tree.levels import Asked, LevelHeads
from vllm_medusa.tree.static import check_size


class BeamTree:
    """Grows a tree of at most ``num_nodes`` nodes for each request.

    Args:
        num_heads: heads that draft, the deepest node's depth.
        num_nodes: most nodes of a tree, the root not counted.
        top_k: most children of a node.
        beam: most nodes of a depth that may have children.
        min_probability: the least probability of a path that is drafted.

    Raises:
        ValueError: ``num_nodes`` is too many, or more than the beam can find.

    """

    branches = True

    def __init__(self, num_heads: int, num_nodes: int, top_k: int, beam: int, min_probability: float) -> None:
        check_size(num_nodes)
        self.depth = min(num_heads, num_nodes)
        self.num_nodes, self.top_k = num_nodes, min(top_k, num_nodes)
        self.beam, self.min_probability = beam, min_probability
        asked = [1]
        for _ in range(1, self.depth):
            asked.append(min(beam, asked[-1] * self.top_k))
        found = self.top_k * sum(asked)
        if found < num_nodes:
            raise ValueError(
                f"medusa_tree: {self.depth} heads give trees of at most {found} nodes where {beam} of a depth may "
                f"have {self.top_k} children each, not {num_nodes}; lower num_speculative_tokens, raise medusa_top_k, "
                "or, for plain heads, give medusa_lookup false"
            )
        self._rows = torch.arange(num_nodes + 1)

    def to(self, device: torch.device) -> BeamTree:
        """Return a tree that grows on another device."""
        moved = copy.copy(self)
        moved._rows = self._rows.to(device)
        return moved

    def draft(
        self,
        heads: LevelHeads,
        roots: torch.Tensor,  # [num_reqs], int64
        least_parent: float = 0.0,
    ) -> Drafts:
        """Grow each request's tree, best first.

        Args:
            heads: heads that have not been asked yet.
            roots: the token that the target has sampled last.
            least_parent: the least probability of a node that has children. Above 0 heads are asked for no more nodes
                than some request has of these, and not for levels where none has one, which waits for the device.

        """
        num_reqs = len(roots)
        asked, own = Asked(roots[:, None]), roots.new_zeros(num_reqs, 1)  # Candidate 0 is the root.
        scores = torch.zeros(num_reqs, 1, device=roots.device)
        num_found = 1
        all_tokens, all_parents, all_scores = [asked.tokens], [own], [scores]
        for depth in range(1, self.depth + 1):
            log_probs, tokens = heads.top_predictions(asked, self.top_k)
            of_path = scores[:, :, None] + log_probs.nan_to_num(nan=-math.inf, neginf=-math.inf)
            tokens, of_path = tokens.flatten(1), of_path.flatten(1)
            all_tokens.append(tokens)
            all_parents.append(own.repeat_interleave(self.top_k, dim=1))
            all_scores.append(of_path)
            if depth == self.depth:
                break
            scores, index = of_path.topk(min(self.beam, of_path.shape[1]), dim=1)
            if least_parent:
                width = int((scores >= math.log(least_parent)).sum(dim=1).max())
                if not width:
                    break
                scores, index = scores[:, :width], index[:, :width]
            asked = Asked(tokens.gather(1, index), index // self.top_k)
            own = index + num_found
            num_found += tokens.shape[1]
        tokens, parents, scores = (torch.cat(parts, dim=1) for parts in (all_tokens, all_parents, all_scores))
        if (missing := self.num_nodes + 1 - tokens.shape[1]) > 0:
            tokens, parents = pad(tokens, (0, missing)), pad(parents, (0, missing))
            scores = pad(scores, (0, missing), value=-math.inf)
        return grow_trees(scores, parents, self._rows, self.min_probability, lambda node: tokens.gather(1, node))
