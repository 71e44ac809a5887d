# SPDX-License-Identifier: Apache-2.0
"""Images as tars: what is in them, that equal inputs give equal bytes, and what is read of a Dockerfile."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from e2e.cluster.errors import BuildError
from e2e.cluster.images import archive, product


def layer(path: Path, text: str) -> Path:
    made = archive.Layer(path)
    made.directory("etc")
    made.file("etc/name", text.encode(), 0o644)
    made.link("etc/alias", "name")
    return made.close()


def write(folder: Path) -> Path:
    folder.mkdir()
    shared, own = layer(folder / "shared", "shared"), layer(folder / "own", "own")
    config = archive.Config(entrypoint=("/run",), environment={"A": "1"}, user="5:5")
    return archive.write_all(
        folder / "images.tar",
        {"valve.test/a:1": ([shared], config), "valve.test/b:1": ([shared, own], config)},
    )


def test_an_archive_holds_each_image_and_each_layer_once(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path / "one")) as tar:
        read = {name: tar.extractfile(name) for name in tar.getnames()}
        manifest = json.loads(file.read()) if (file := read["manifest.json"]) else None
        assert manifest
        assert [entry["RepoTags"] for entry in manifest] == [["valve.test/a:1"], ["valve.test/b:1"]]
        assert manifest[0]["Layers"] == manifest[1]["Layers"][:1]
        assert len(read) == 1 + 2 + 2, "a manifest, two configs, two layers"
        for entry in manifest:
            config = json.load(file) if (file := read[entry["Config"]]) else {}
            assert config["config"]["Entrypoint"] == ["/run"]
            assert (config["config"]["Env"], config["config"]["User"]) == (["A=1"], "5:5")
            for member, digest in zip(entry["Layers"], config["rootfs"]["diff_ids"], strict=True):
                opened = tar.extractfile(member)
                assert opened
                assert digest == "sha256:" + hashlib.sha256(opened.read()).hexdigest()


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "one").read_bytes() == write(tmp_path / "two").read_bytes()


def test_an_image_without_a_tag_is_refused(tmp_path: Path) -> None:
    made = layer(tmp_path / "layer", "x")
    with pytest.raises(BuildError, match=r"write valve\.test/a:TAG"):
        archive.write(tmp_path / "x.tar", "valve.test/a", [made], archive.Config())


DOCKERFILE = """\
ARG BASE=x
FROM x AS site
RUN something that is not read
FROM ${BASE}
LABEL a="1" \\
      b="2"
ENV PYTHONPATH=/usr/lib/valve A=b
COPY --from=runtime /runtime/lib /usr/share/valve/runtime/lib
USER 7:7
ENTRYPOINT ["python3", "-m", "it"]
"""


def test_the_final_stage_of_a_dockerfile_is_read() -> None:
    part = product.component("agent", DOCKERFILE)
    assert part.with_runtime
    assert (part.config.entrypoint, part.config.user) == (("python3", "-m", "it"), "7:7")
    assert part.config.environment["A"] == "b"


@pytest.mark.parametrize(
    ("description", "change", "sentence"),
    [
        ("an instruction that is not known", ("USER 7:7", "RUN rm -rf /"), "has a RUN that .* must learn"),
        ("packages elsewhere", ("/usr/lib/valve A=b", "/elsewhere"), "must set PYTHONPATH=/usr/lib/valve"),
    ],
)
def test_a_dockerfile_that_is_not_understood_is_refused(
    description: str, change: tuple[str, str], sentence: str
) -> None:
    with pytest.raises(BuildError, match=sentence):
        product.component("agent", DOCKERFILE.replace(*change))


def test_every_shipped_dockerfile_is_understood() -> None:
    assert [part.with_runtime for part in product.components()] == [False, False, True]
