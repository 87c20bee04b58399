"""The map that gives a token its hue in the routing view: fitted to an adapter when its first reply is generated.

It is fitted to one forward pass over a text that is part of the program, and kept with the loaded adapter. An adapter's
folder may be read-only or somebody else's, and its training data need not be here; a fixed text gives the same map in
every session without a file that could be stale or damaged, bit for bit on one machine with one number of threads.
"""

from __future__ import annotations

import torch

from mole.data.encoding import encode_text
from mole.mixture.routing_map import RoutingMap
from mole.mixture.trace import record_routing
from mole.models.context import context_length
from mole.models.loading import Loaded

MAX_TOKENS = 192
# What chats are made of: questions, instructions, prose, numbers, code, JSON, lists, other languages, names.
TEXT = """What is the capital of France, and how many people live there? Paris has about 2.1 million inhabitants.
Convert 83 l to ml: 83 × 1000 = 83,000 ml. Please rewrite this sentence in a friendly tone.
{"name": "Ada Lovelace", "born": 1815, "city": "London", "tags": ["maths", "poetry"]}
def area(radius: float) -> float:
    return 3.14159 * radius ** 2
Sort these words: pear, apple, fig. Answer: apple, fig, pear.
The old lighthouse stood at the edge of the cliff, and nobody had climbed its stairs since the storm of that winter.
- First, heat the oil; then add 2 onions.
- Second, stir for 10 minutes (not longer!).
Guten Morgen, wie geht es dir? ¿Dónde está la biblioteca? Il fait beau aujourd'hui.
Is the review positive or negative? "I waited an hour and the food was cold." Negative.
In 1969, Apollo 11 landed on the Moon; Neil Armstrong said: "That's one small step for man."
"""


def reference_ids(loaded: Loaded) -> list[int]:
    """The text's first tokens, as many as the model reads."""
    return encode_text(TEXT, loaded.tokenizer)[: min(MAX_TOKENS, context_length(loaded.model.config))]


def fit_map(loaded: Loaded, ids: list[int]) -> RoutingMap | None:
    """The map of the active adapter's routing, from a forward pass over `ids`; None if its tokens are too few or alike.

    The first token is left out: many models give it a role of its own, far from all others.
    """
    model = loaded.model
    # As in generation: the logits of every token would take as long as several layers.
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    with record_routing(model) as trace, torch.no_grad():
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, **options)
    return RoutingMap.fit(list(trace.modules), trace.weights[1:])
