"""What stops a run although every process could go on: ranks that plan different exports, a source that changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch")

from support.small_models import LLAMA, small_model  # noqa: E402
from support.torch_dist import write_torch_dist  # noqa: E402

from dist_export import api  # noqa: E402
from dist_export.errors import ExportError  # noqa: E402
from dist_export.runtime.group import Group  # noqa: E402
from dist_export.session import ExportSession, RunOptions  # noqa: E402
from dist_export.targets.trtllm.target import TrtllmOptions  # noqa: E402


class OtherPlan(ExportSession):
    """A rank whose rank 0 has planned the second file otherwise."""

    def _agree(self):
        agreement = ExportSession._agree(self)
        return replace(agreement, digests=[agreement.digests[0], "0" * 64])


class ChangedSource(ExportSession):
    """The checkpoint is saved again while it is read."""

    def _work(self, placement):
        for path in sorted(self.checkpoint.index.folder.glob("*.distcp")):
            os.utime(path, (1, 1))
        return ExportSession._work(self, placement)


@pytest.mark.parametrize(
    "session, message",
    [
        (OtherPlan, r"rank 0 plans .*rank1.safetensors differently from rank 0 \(digests .* and 000000000000\)"),
        (ChangedSource, "files changed during the export; start it again"),
    ],
)
def test_nothing_is_published(session: type[ExportSession], message: str, tmp_path: Path) -> None:
    model = small_model(LLAMA)
    checkpoint = write_torch_dist(tmp_path / "checkpoint", model.tensors, args=model.args)
    opened = api.open_model(api.Source(checkpoint=checkpoint))
    job = api.plan_job(opened, (TrtllmOptions(tp_size=2),))
    with pytest.raises(ExportError, match=message), Group.single() as group:
        session(opened.checkpoint, job, RunOptions(output=tmp_path / "out"), group).run()
    assert not (tmp_path / "out").exists()
