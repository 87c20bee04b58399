"""The atlas: what the experts of an adapter do, over a whole data file.

`corpus` reads the rows and the columns to look at, `segments` encodes them as in training and tells what each token is,
`recorder` gets the routing of whole batches, `counts`, `contexts` and `activity` add it up in bounded memory,
`information` says how much the choice of experts tells of the data. `saturation` and `muting` measure on a sample.
`build` puts an atlas together, `comparison` two of them, `page` writes one as HTML, and `job` computes one in the
background and keeps it in the run's folder.
"""

from typing import TYPE_CHECKING

from mole.core.lazy import lazy_exports

if TYPE_CHECKING:
    from mole.analysis.atlas.build import build_atlas
    from mole.analysis.atlas.corpus import Corpus, read_corpus
    from mole.analysis.atlas.page import atlas_page

__all__ = ["Corpus", "atlas_page", "build_atlas", "read_corpus"]

__getattr__ = lazy_exports(
    __name__,
    {
        "Corpus": "mole.analysis.atlas.corpus",
        "atlas_page": "mole.analysis.atlas.page",
        "build_atlas": "mole.analysis.atlas.build",
        "read_corpus": "mole.analysis.atlas.corpus",
    },
)
