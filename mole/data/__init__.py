"""From a data file to batches of tokens.

`readers` opens files, compressed ones too, and hub data sets; `text_formats` and `parquet` find their rows;
`shapes` and `columns` find which column is what; `examples` and `messages` turn rows of five shapes into `Example`s, or
reject them with a reason; `rendering` applies `chat_templates` and finds what is learnt; `encoding` makes token ids and
labels; `mixing` makes one training set of several files; `datasets` reads, encodes and splits the data of a run;
`batches` pads. No torch until a batch is made.
"""

from mole.data.batches import Collator, split_by_length
from mole.data.chat_templates import DEFAULT_CHAT_TEMPLATE, chat_template, render_prompt
from mole.data.columns import (
    DetectedColumns,
    describe_columns,
    detect_columns,
    guess_mapping,
    mapping_for_shape,
    read_columns,
)
from mole.data.datasets import DataReport, Datasets, build_datasets, split_rows
from mole.data.encoding import IGNORE_INDEX, EncodedExample, encode_example, encode_examples
from mole.data.examples import Example, ExampleSet, RejectedRow, no_usable_rows, read_examples
from mole.data.messages import Message
from mole.data.mixing import (
    check_different,
    errors_of,
    fingerprint_of,
    read_source,
    read_sources,
    short_labels,
    weighted,
)
from mole.data.readers import FILE_SUFFIXES, Records, read_hub_dataset, read_records
from mole.data.shapes import FIELDS, SHAPES

__all__ = [
    "DEFAULT_CHAT_TEMPLATE", "FIELDS", "FILE_SUFFIXES", "IGNORE_INDEX", "SHAPES", "Collator", "DataReport",
    "Datasets", "DetectedColumns", "EncodedExample", "Example", "ExampleSet", "Message", "Records", "RejectedRow",
    "build_datasets", "chat_template", "check_different", "describe_columns", "detect_columns", "encode_example",
    "encode_examples", "errors_of", "fingerprint_of", "guess_mapping", "mapping_for_shape", "no_usable_rows",
    "read_columns", "read_examples", "read_hub_dataset", "read_records", "read_source", "read_sources",
    "render_prompt", "short_labels", "split_by_length", "split_rows", "weighted",
]  # fmt: skip
