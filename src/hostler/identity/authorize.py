"""THE table: every endpoint and what a caller needs to use it, and the one function that decides.

An endpoint that does not stand here does not start (the REST edge checks its routes against it), so that nothing is
ever open because somebody forgot to close it.
"""

from __future__ import annotations

from enum import StrEnum

from hostler.model.errors import NotAuthenticated, NotPermitted
from hostler.model.principal import Permission, Principal


class Access(StrEnum):
    """What stands in the table where no permission is asked for."""

    AUTHENTICATED = "authenticated"
    """Anybody who is known."""
    INVITED = "invited"
    """Nobody is known yet: the one-time secret inside the body is checked by the operation itself."""


Rule = Permission | Access

_P = Permission

TABLE: dict[str, Rule] = {
    "GET /v1/version": Access.AUTHENTICATED,
    # hosts
    "GET /v1/host": _P.VIEW,
    "GET /v1/hosts": _P.VIEW,
    "GET /v1/limits": _P.VIEW,
    "POST /v1/hosts/invitations": _P.ADMINISTER,
    "POST /v1/hosts/join": _P.ADMINISTER,
    "DELETE /v1/hosts/{host}": _P.ADMINISTER,
    # vms
    "GET /v1/vms": _P.VIEW,
    "POST /v1/vms": _P.CONFIGURE,
    "GET /v1/vms/{vm}": _P.VIEW,
    "PATCH /v1/vms/{vm}": _P.CONFIGURE,
    "DELETE /v1/vms/{vm}": _P.CONFIGURE,
    "POST /v1/vms/{vm}/start": _P.OPERATE,
    "POST /v1/vms/{vm}/pause": _P.OPERATE,
    "POST /v1/vms/{vm}/resume": _P.OPERATE,
    "POST /v1/vms/{vm}/save": _P.OPERATE,
    "POST /v1/vms/{vm}/restore": _P.OPERATE,
    "POST /v1/vms/{vm}/discard-saved": _P.OPERATE,
    "POST /v1/vms/{vm}/turn-off": _P.OPERATE,
    "POST /v1/vms/{vm}/reset": _P.OPERATE,
    "POST /v1/vms/{vm}/shutdown": _P.OPERATE,
    "POST /v1/vms/{vm}/migrate": _P.OPERATE,
    "POST /v1/vms/{vm}/migrate/check": _P.VIEW,
    "GET /v1/vms/{vm}/screenshot": _P.VIEW,
    "WEBSOCKET /v1/vms/{vm}/serial": _P.OPERATE,
    "WEBSOCKET /v1/vms/{vm}/vnc": _P.OPERATE,
    "POST /v1/vms/{vm}/disks": _P.CONFIGURE,
    "DELETE /v1/vms/{vm}/disks/{disk}": _P.CONFIGURE,
    "PATCH /v1/vms/{vm}/disks/{disk}": _P.CONFIGURE,
    "POST /v1/vms/{vm}/disks/{disk}/move": _P.CONFIGURE,
    "POST /v1/vms/{vm}/disks/{disk}/flatten": _P.CONFIGURE,
    "POST /v1/vms/{vm}/disks/{disk}/grow": _P.CONFIGURE,
    "POST /v1/vms/{vm}/disks/{disk}/limits": _P.CONFIGURE,
    # Names any image that the daemon can read, hence not for operators.
    "POST /v1/vms/{vm}/disks/{disk}/medium": _P.CONFIGURE,
    "POST /v1/vms/{vm}/nics": _P.CONFIGURE,
    "DELETE /v1/vms/{vm}/nics/{nic}": _P.CONFIGURE,
    # checkpoints
    "GET /v1/vms/{vm}/checkpoints": _P.VIEW,
    "POST /v1/vms/{vm}/checkpoints": _P.OPERATE,
    "GET /v1/vms/{vm}/checkpoints/{checkpoint}": _P.VIEW,
    "PATCH /v1/vms/{vm}/checkpoints/{checkpoint}": _P.OPERATE,
    "DELETE /v1/vms/{vm}/checkpoints/{checkpoint}": _P.CONFIGURE,
    "POST /v1/vms/{vm}/checkpoints/{checkpoint}/apply": _P.CONFIGURE,
    "POST /v1/vms/{vm}/checkpoints/{checkpoint}/clone": _P.CONFIGURE,
    # volumes
    "GET /v1/volumes": _P.VIEW,
    "POST /v1/volumes": _P.CONFIGURE,
    "POST /v1/volumes/register": _P.CONFIGURE,
    # Reads any path that the daemon can read, hence not for viewers.
    "POST /v1/volumes/inspect": _P.CONFIGURE,
    "POST /v1/volumes/chain": _P.CONFIGURE,
    "POST /v1/volumes/flatten": _P.CONFIGURE,
    "GET /v1/volumes/{volume}": _P.VIEW,
    "DELETE /v1/volumes/{volume}": _P.CONFIGURE,
    "GET /v1/volumes/{volume}/details": _P.VIEW,
    "POST /v1/volumes/{volume}/checksum": _P.OPERATE,
    "POST /v1/volumes/{volume}/validate": _P.CONFIGURE,
    "POST /v1/volumes/{volume}/grow": _P.CONFIGURE,
    "POST /v1/volumes/{volume}/shrink": _P.CONFIGURE,
    "POST /v1/volumes/{volume}/convert": _P.CONFIGURE,
    "POST /v1/volumes/{volume}/compact": _P.CONFIGURE,
    "POST /v1/volumes/{volume}/clone": _P.CONFIGURE,
    # pools
    "GET /v1/pools": _P.VIEW,
    # Makes paths of the host, and addresses it can reach, known to the platform: more than configuring VMs.
    "POST /v1/pools": _P.ADMINISTER,
    # Connects to any address, with secrets of the caller.
    "POST /v1/pools/discover": _P.ADMINISTER,
    "GET /v1/pools/{pool}": _P.VIEW,
    "PATCH /v1/pools/{pool}": _P.ADMINISTER,
    "DELETE /v1/pools/{pool}": _P.ADMINISTER,
    "POST /v1/pools/{pool}/scan": _P.CONFIGURE,
    # machines from elsewhere: descriptions and images at any path that the daemon can read, as with volumes
    "POST /v1/imports/inspect": _P.CONFIGURE,
    "POST /v1/imports": _P.CONFIGURE,
    # backups: made in and read from any directory that the daemon can reach, as with volumes
    "POST /v1/vms/{vm}/backups": _P.CONFIGURE,
    "POST /v1/backups/list": _P.CONFIGURE,
    "POST /v1/backups/show": _P.CONFIGURE,
    "POST /v1/backups/verify": _P.CONFIGURE,
    "POST /v1/backups/restore": _P.CONFIGURE,
    "POST /v1/backups/export": _P.CONFIGURE,
    "POST /v1/backups/delete": _P.CONFIGURE,
    "POST /v1/backups/prune": _P.CONFIGURE,
    # writes to any directory that the daemon can write to, as a volume with a path does
    "POST /v1/vms/{vm}/export": _P.CONFIGURE,
    "POST /v1/vms/{vm}/export/check": _P.CONFIGURE,
    # jobs and events
    "GET /v1/jobs": _P.VIEW,
    "GET /v1/jobs/{job}": _P.VIEW,
    "POST /v1/jobs/{job}/cancel": _P.OPERATE,
    "GET /v1/events": _P.VIEW,
    # tokens
    "GET /v1/tokens": _P.ADMINISTER,
    "POST /v1/tokens": _P.ADMINISTER,
    "DELETE /v1/tokens/{token}": _P.ADMINISTER,
    # host to host
    "POST /peer/v1/join": Access.INVITED,
    "GET /peer/v1/facts": _P.PEER,
    "POST /peer/v1/check": _P.PEER,
    "POST /peer/v1/incoming": _P.PEER,
    "GET /peer/v1/incoming/{id}": _P.PEER,
    "POST /peer/v1/incoming/{id}/accept": _P.PEER,
    "DELETE /peer/v1/incoming/{id}": _P.PEER,
    "GET /peer/v1/outgoing/{id}": _P.PEER,
}
"""Method (WEBSOCKET for web sockets) and path template to what is asked for."""


def decide(endpoint: str, principal: Principal | None) -> None:
    """Returns when `principal` (None: nobody is known) may use the endpoint; NotAuthenticated or NotPermitted
    otherwise. An endpoint that is not in the table is refused to everybody."""
    rule = TABLE.get(endpoint)
    if rule is Access.INVITED:
        return
    if principal is None:
        raise NotAuthenticated(
            endpoint,
            "nobody is logged in",
            "give a token ('hostler token create' makes one), or use the unix socket on the host itself",
        )
    if rule is Access.AUTHENTICATED or (isinstance(rule, Permission) and principal.may(rule)):
        return
    needed = f"the permission '{rule}'" if rule else "a rule in the authorization table"
    raise NotPermitted(
        endpoint,
        f"needs {needed}, which {principal.name} with the role '{principal.role}' has not",
        "use a token with another role" if rule is not Permission.PEER else "only hosts that joined may call this",
        role=str(principal.role),
    )
