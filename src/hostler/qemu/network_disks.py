"""Disks that QEMU reaches over the network: LUNs by its own iSCSI initiator, exports of others by NBD. Pure.

A block graph is made in two steps, since who makes it knows the disk but not how its pool is reached just now. First
the protocol node names only its pool and address; then, where it is handed to QEMU (command line or blockdev-add),
`reach` puts in the connection of that pool: portal, names, and the ids of QEMU objects that hold the secrets.

    object   pool-<pool>.secret   a CHAP secret, read from a file
    object   pool-<pool>.tls      X.509 certificates, read from a directory
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import JsonValue

from hostler.model.disk import DiskSource, SourceKind
from hostler.model.errors import HostLacks, InvalidInput
from hostler.model.pool import Connection

Options = dict[str, JsonValue]

POOL: Final = "hostler-pool"
ADDRESS: Final = "hostler-address"
RECONNECT_DELAY: Final = 30
"""Seconds during which I/O waits for a lost server to come back before it fails (and stops the guest, which goes on
when the server is back). The iSCSI initiator waits as long as it takes."""


def protocol_options(layer: DiskSource) -> Options:
    """What is said of the protocol node of a network layer before its pool's connection is known."""
    driver = "iscsi" if layer.kind is SourceKind.ISCSI else "nbd"
    return {"driver": driver, POOL: layer.pool, ADDRESS: layer.path}


def reach(options: Mapping[str, JsonValue], connections: Mapping[str, Connection]) -> Options:
    """The block graph with the connections of its pools put in. HostLacks for a pool that is not among them."""
    done: Options = {
        key: reach(value, connections) if isinstance(value, dict) else value for key, value in options.items()
    }
    if POOL not in done:
        return done
    pool, address = str(done.pop(POOL)), str(done.pop(ADDRESS))
    connection = connections.get(pool)
    if connection is None:
        raise HostLacks(f"disk {address}", f"the pool {pool!r} is not connected to this VM", "attach the disk again")
    return done | (_iscsi(address, connection) if done["driver"] == "iscsi" else _nbd(address, connection))


def objects(connection: Connection) -> list[Options]:
    """The QEMU objects that hold a connection's secrets."""
    made: list[Options] = []
    if connection.secret_file:
        made.append({"qom-type": "secret", "id": secret_id(connection.pool), "file": connection.secret_file})
    if connection.tls_dir:
        made.append(
            {
                "qom-type": "tls-creds-x509",
                "id": tls_id(connection.pool),
                "dir": connection.tls_dir,
                "endpoint": "client",
                "verify-peer": True,
            }
        )
    return made


def secret_id(pool: str) -> str:
    """The object with a pool's CHAP secret."""
    return f"pool-{pool}.secret"


def tls_id(pool: str) -> str:
    """The object with a pool's certificates."""
    return f"pool-{pool}.tls"


def _iscsi(address: str, connection: Connection) -> Options:
    """`timeout` stays 0: a command waits until the target answers. An initiator that gave up would fail the guest's
    writes, which the target may have done, or may do yet."""
    target, _, lun = address.partition("://")[2].partition("/")[2].rpartition("/")
    if not target or not lun.isdigit():
        raise InvalidInput(f"disk {address}", "is no address of a LUN", "use a volume of an iSCSI pool")
    options: Options = {"transport": "tcp", "portal": connection.portal, "target": target, "lun": int(lun)}
    if connection.initiator:
        options["initiator-name"] = connection.initiator
    if connection.user:
        options |= {"user": connection.user, "password-secret": secret_id(connection.pool)}
    return options


def _nbd(address: str, connection: Connection) -> Options:
    host, _, port = connection.portal.rpartition(":")
    options: Options = {
        "server": {"type": "inet", "host": host.strip("[]"), "port": port},
        "export": address.partition("://")[2].partition("/")[2],
        "reconnect-delay": RECONNECT_DELAY,
    }
    if connection.tls_dir:
        options["tls-creds"] = tls_id(connection.pool)
        if connection.tls_hostname:
            options["tls-hostname"] = connection.tls_hostname
    return options
