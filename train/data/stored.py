"""Open rows that were packed earlier, of a corpus or a mixture, even if their text is gone."""

from collections.abc import Mapping

from train.data.config import DataConfig
from train.data.corpus import Split
from train.data.mixture import JoinedRows, is_mixture, parse_mixture
from train.data.packing import PackedRows
from train.data.prepared import stored_rows


def stored_split(
    config: DataConfig, fingerprint: str, sources: Mapping[str, str], split: Split
) -> PackedRows | None:
    """Open the rows of a split that were packed earlier, even if their corpus has changed.

    Args:
        config: Corpus or mixture, row length and cache.
        fingerprint: Fingerprint of the data of a corpus (`PackedData.fingerprint`), which a mixture
            does not use.
        sources: Mapping from the name of each source of a mixture to the fingerprint of its rows
            (`PackedData.sources`), which a single corpus does not use.
        split: Split of the rows.

    Returns:
        Rows of the corpus, or of all sources of the mixture; None if the cache lacks some rows.

    Raises:
        DataError: The rows are damaged, or the text of the mixture has a mistake.
    """
    if not is_mixture(config.corpus):
        return stored_rows(config, fingerprint, split)
    mixture = parse_mixture(config.corpus)
    parts: dict[str, PackedRows] = {}
    for name in mixture.names:
        rows = stored_rows(config, sources.get(name, ""), split)
        if rows is None:
            return None
        parts[name] = rows
    return JoinedRows(parts, mixture.last_weights)
