"""Makes the sample data: four short skills, in skills_train.jsonl and skills_heldout.jsonl beside this file.

Run `python assets/data/make_skills.py [FOLDER]`; the same seed gives the same bytes. What is held out is more than
rows: its numbers, names, cities, events and sets of digits never occur in the training rows of their skill.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = 20
TRAIN_ROWS, HELDOUT_ROWS = 400, 60  # of each skill

Row = dict[str, str]

UNITS = [("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000), ("l", "ml", 1000), ("t", "kg", 1000)]
UNIT_PROMPTS = ["Convert {n} {a} to {b}.", "How many {b} are {n} {a}?", "Give {n} {a} in {b}."]


def phrases(text: str) -> list[str]:
    """The parts of a text between upright bars."""
    return [" ".join(part.split()) for part in text.split("|")]


NAMES = phrases(
    """
    Anna | Ben | Carla | David | Emma | Felix | Grace | Henry | Irene | Jack | Karen | Leo | Maria | Noah |
    Olivia | Paul | Rosa | Simon | Tina | Victor | Walter | Yara | Alice | Bruno | Clara | Daniel | Eva |
    Frank | Gloria | Hugo | Julia | Kevin | Laura | Martin | Nina | Oscar | Peter | Rachel | Sam | Tom
    """
)
CITIES = phrases(
    """
    Paris | Rome | Berlin | Madrid | Lisbon | Vienna | Prague | Dublin | Oslo | Athens | London | Boston |
    Chicago | Dallas | Denver | Seattle | Toronto | Tokyo | Delhi | Cairo | Lima | Moscow | Warsaw | Geneva |
    Milan | Venice | Munich | Miami | Sydney | Bangkok
    """
)
EXTRACTION_PROMPTS = [
    "Name and city as JSON: {s}",
    "{s} Give name and city as JSON.",
    "Extract name and city to JSON: {s}",
]
EXTRACTION_SENTENCES = phrases(
    """
    {name} lives in {city}. | Last spring {name} moved to {city}. | We met {name} at the station in {city}. |
    {name} opened a small bakery in {city}. | In {city}, {name} repairs old clocks. |
    My cousin {name} studies law in {city}. | {name} missed the last train to {city}. |
    A letter from {name} came from {city}. | Every summer {name} sings in {city}. |
    The mayor of {city} thanked {name}. | {name} drove all night to reach {city}. |
    It was raining in {city} when {name} arrived.
    """
)

TONE_PROMPTS = ["Tone (happy, sad or angry): {s}", "Is this happy, sad or angry? {s}", "{s} Happy, sad or angry?"]
TONE_SENTENCES = {
    "happy": phrases(
        """
        Wonderful news: {e}! | I am so glad that {e}. | I can't stop smiling, {e}! | What a lovely day: {e}. |
        We danced and cheered because {e}. | Hooray, {e}! | It makes me smile that {e}. |
        How delightful that {e}!
        """
    ),
    "sad": phrases(
        """
        I cried because {e}. | With a heavy heart I heard that {e}. | I feel empty since {e}. |
        It breaks my heart that {e}. | Tears fell when {e}. | I am so lonely now that {e}. | Sadly, {e}. |
        We wept all evening because {e}.
        """
    ),
    "angry": phrases(
        """
        How dare they, {e}! | I am furious that {e}. | This is outrageous: {e}! | I will not accept that {e}! |
        I slammed the door because {e}. | Enough is enough, {e}! | It makes my blood boil that {e}. |
        I shouted at them when {e}.
        """
    ),
}
TONE_EVENTS = {
    "happy": phrases(
        """
        the puppy learned its name | my sister won first prize | the garden is full of roses |
        we found the lost keys | our team won the cup | the baby took her first steps |
        grandma baked my favourite cake | I got the job | the sun came out for our picnic |
        my painting will hang in the museum | the doctor says I am healthy |
        our old friends are visiting tonight | the school band played so well | we are going to the sea tomorrow |
        he said yes | my brother came home early | the kittens opened their eyes | I passed the driving test |
        the neighbours sent us flowers | everyone loved the soup
        """
    ),
    "sad": phrases(
        """
        the old dog died | my best friend moved away | nobody came to the party |
        the house of my childhood is gone | grandpa no longer knows my name | the last letter was lost |
        she left without a goodbye | the bird never woke up | the village was empty | my mother is so ill |
        the little shop had to close | we will not meet again | the tree we planted has withered |
        his chair stays empty at dinner | the music stopped forever | our cat did not come back |
        the wedding was called off | I lost my father's watch | the children are far away |
        the summer together is over
        """
    ),
    "angry": phrases(
        """
        they cancelled my order again | somebody scratched my car | the landlord lied to us | he stole my idea |
        they charged me twice | the clerk hung up on me | the drill starts at five every morning |
        she read my diary | the waiter insulted my guest | they broke the promise again |
        nobody answers my complaint | he blamed me for his mistake | the driver cut me off |
        they threw rubbish over our fence | the company ignored the warning | he parked in front of my gate |
        they sold me a broken phone | she mocked my little brother | the boss took the credit |
        they opened my mail
        """
    ),
}

SORT_PROMPTS = ["Sort: {s}", "Put {s} in order.", "Sort {s} from small to large."]


def parted(rng: random.Random, values: list, held: int) -> tuple[list, list]:
    """`values` shuffled into those for training and `held` of them for the held-out rows."""
    shuffled = rng.sample(values, len(values))
    return shuffled[held:], shuffled[:held]


def units(rng: random.Random) -> Iterator[list[Row]]:
    for numbers in parted(rng, list(range(2, 100)), 14):
        rows = itertools.product(numbers, UNITS)
        yield [
            {"prompt": rng.choice(UNIT_PROMPTS).format(n=n, a=a, b=b), "completion": f"{n * factor} {b}"}
            for n, (a, b, factor) in rows
        ]


def extraction(rng: random.Random) -> Iterator[list[Row]]:
    names, cities = parted(rng, NAMES, 8), parted(rng, CITIES, 6)
    for pairs in ([*itertools.product(names[i], cities[i])] for i in range(2)):
        rows = []
        for name, city in itertools.chain(pairs, pairs):
            sentence = rng.choice(EXTRACTION_SENTENCES).format(name=name, city=city)
            answer = json.dumps({"name": name, "city": city})
            rows.append({"prompt": rng.choice(EXTRACTION_PROMPTS).format(s=sentence), "completion": answer})
        yield rows


def tone(rng: random.Random) -> Iterator[list[Row]]:
    events = {name: parted(rng, values, 3) for name, values in TONE_EVENTS.items()}
    for part in range(2):
        yield [
            {"prompt": rng.choice(TONE_PROMPTS).format(s=frame.format(e=event)), "completion": name}
            for name, frames in TONE_SENTENCES.items()
            for frame, event in itertools.product(frames, events[name][part])
        ]


def sorting(rng: random.Random) -> Iterator[list[Row]]:
    for sets in parted(rng, [*itertools.combinations("0123456789", 3)], 20):
        yield [
            {"prompt": rng.choice(SORT_PROMPTS).format(s=" ".join(order)), "completion": " ".join(digits)}
            for digits in sets
            for order in itertools.permutations(digits)
        ]


SKILLS = {"units": units, "extraction": extraction, "tone": tone, "sorting": sorting}


def make(folder: Path) -> None:
    """Write both files into `folder`."""
    rng = random.Random(SEED)
    train: list[Row] = []
    heldout: list[Row] = []
    for skill, candidates in SKILLS.items():
        for rows, part, count in zip(candidates(rng), (train, heldout), (TRAIN_ROWS, HELDOUT_ROWS), strict=True):
            distinct = list({row["prompt"]: row for row in rows}.values())
            part += [{"skill": skill, **row} for row in rng.sample(distinct, count)]
    for name, part in (("skills_train.jsonl", train), ("skills_heldout.jsonl", heldout)):
        rng.shuffle(part)
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / name).write_bytes(text.encode())


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
