"""The files of a rank-sharded checkpoint: what they are called, what they hold, how they are written and verified.

    model_0003749.rank_0.pth ...      one file per rank, a dict of tensors, numbers, strings, lists and dicts
    model_0003749.manifest.json       written last: sizes and CRC32 checksums; a checkpoint without it does not exist
    *.tmp                             being written

A rank file holds the rows of tensors that its rank had, with their places in the whole; tensors that several ranks had
are in one file only. `StoredCheckpoint` puts them together again, for any number of readers. Checksums cover every
block of a file, so that a part can be verified alone.
"""

from dinov2.checkpoint_format.clean_up import (
    foreign_rank_files,
    remove_checkpoint,
    remove_incomplete,
    remove_leftovers,
)
from dinov2.checkpoint_format.disk import flush_folder, write_text
from dinov2.checkpoint_format.manifest import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    DamagedCheckpointError,
    FileRecord,
    Manifest,
    open_checkpoint,
    remove_manifest,
    write_manifest,
)
from dinov2.checkpoint_format.mapped_file import MappedFile, RankIndex, TensorEntry
from dinov2.checkpoint_format.names import (
    checkpoint_name,
    find_checkpoints,
    has_manifest,
    is_checkpoint_path,
    iteration_of,
    manifest_name,
    rank_file_name,
    split_path,
)
from dinov2.checkpoint_format.rank_file import (
    copy_rank_file,
    discard_rank_file,
    publish_rank_file,
    to_plain,
    write_rank_file,
)
from dinov2.checkpoint_format.stored import (
    Piece,
    StoredCheckpoint,
    StoredPieces,
    is_optimizer_state,
    read_rank_index,
)

__all__ = [
    "BLOCK_BYTES",
    "FORMAT_VERSION",
    "DamagedCheckpointError",
    "FileRecord",
    "Manifest",
    "MappedFile",
    "Piece",
    "RankIndex",
    "StoredCheckpoint",
    "StoredPieces",
    "TensorEntry",
    "checkpoint_name",
    "copy_rank_file",
    "discard_rank_file",
    "find_checkpoints",
    "flush_folder",
    "foreign_rank_files",
    "has_manifest",
    "is_checkpoint_path",
    "is_optimizer_state",
    "iteration_of",
    "manifest_name",
    "open_checkpoint",
    "publish_rank_file",
    "rank_file_name",
    "read_rank_index",
    "remove_checkpoint",
    "remove_incomplete",
    "remove_leftovers",
    "remove_manifest",
    "split_path",
    "to_plain",
    "write_manifest",
    "write_rank_file",
    "write_text",
]
