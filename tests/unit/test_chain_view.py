"""Chains as people see them, from real reports."""

from __future__ import annotations

import json

import pytest

from hostler.cli.chain_view import tree
from hostler.model.chain import ChainImage, ChainReport
from hostler.model.links import ImageKind, LinkState
from hostler.model.units import GiB, MiB

pytestmark = pytest.mark.unit


def image(name: str, parent: str | None, link: LinkState = LinkState.SOUND, **more: object) -> ChainImage:
    return ChainImage(
        path=f"/x/{name}",
        format="vhdx",
        kind=ImageKind.DIFFERENCING if parent else ImageKind.DYNAMIC,
        size=40 * GiB,
        allocated=300 * MiB,
        parent=parent and f"/x/{parent}",
        link=link,
        **more,
    )


def shown(*images: ChainImage, path: str = "/x") -> list[str]:
    sound = all(one.is_sound for one in images)
    return tree(json.loads(ChainReport(path=path, images=images, sound=sound).model_dump_json())).splitlines()


def test_children_stand_below_their_parents() -> None:
    base = image("base.vhdx", None, LinkState.BASE)
    assert shown(image("c.avhdx", "a.avhdx"), image("b.avhdx", "base.vhdx"), image("a.avhdx", "base.vhdx"), base) == [
        "base.vhdx  vhdx dynamic, 40 GiB, 300 MiB on disk",
        "|-- a.avhdx  vhdx differencing, 40 GiB, 300 MiB on disk",
        "|   `-- c.avhdx  vhdx differencing, 40 GiB, 300 MiB on disk",
        "`-- b.avhdx  vhdx differencing, 40 GiB, 300 MiB on disk",
        "every link is sound",
    ]


def test_what_is_wrong_is_said_beside_it() -> None:
    lost = image("lost.avhdx", None, LinkState.MISSING, problem="builds on 'b.vhdx'", advice="bring it")
    broken = ChainImage(path="/x/broken.vhd", link=LinkState.DAMAGED, problem="is damaged: no footer")
    log = image("log.vhdx", None, LinkState.BASE, log_pending=True, warnings=("it is larger than its parent",))
    assert shown(lost, broken, log) == [
        "broken.vhd  damaged",
        "    damaged: is damaged: no footer",
        "log.vhdx  vhdx dynamic, 40 GiB, 300 MiB on disk",
        "    not closed by its last user: read with its log replayed",
        "    warning: it is larger than its parent",
        "lost.avhdx  vhdx dynamic, 40 GiB, 300 MiB on disk",
        "    missing: builds on 'b.vhdx'",
        "    -> bring it",
        "2 of 3 cannot be used as they are",
    ]


def test_a_loop_ends() -> None:
    one = image("a.avhdx", "b.avhdx", LinkState.LOOP, problem="its parents lead back to itself")
    two = image("b.avhdx", "a.avhdx", LinkState.LOOP, problem="its parents lead back to itself")
    assert shown(one, two)[-1] == "2 of 2 cannot be used as they are"


def test_a_chain_of_one_image_shows_paths_that_are_elsewhere() -> None:
    base = image("base.vhdx", None, LinkState.BASE).but(path="/elsewhere/base.vhdx")
    top = image("a.avhdx", None).but(parent="/elsewhere/base.vhdx")
    assert shown(top, base, path="/x/a.avhdx")[0].startswith("/elsewhere/base.vhdx")
    assert shown()[0] == "no VHD or VHDX in /x"
