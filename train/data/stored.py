"""Rows that were packed before, of a corpus or of a mixture, also where their text is gone now."""

from collections.abc import Mapping

from train.data.config import DataConfig
from train.data.corpus import Split
from train.data.mixture import JoinedRows, is_mixture, parse_mixture
from train.data.packing import PackedRows
from train.data.prepared import stored_rows


def stored_split(
    config: DataConfig, fingerprint: str, sources: Mapping[str, str], split: Split
) -> PackedRows | None:
    """Rows of a split that were packed before, whatever the corpus or the sources hold now.

    Args:
        config: Corpus or mixture, row length and cache.
        fingerprint: Fingerprint of the data of a corpus, `PackedData.fingerprint`.
        sources: Fingerprint of each source of a mixture by its name, `PackedData.sources`.
        split: Split of the rows.

    Returns:
        The rows, or None if the cache lacks them or those of a source.

    Raises:
        DataError: The rows are damaged, or the mixture is not written as one.
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
