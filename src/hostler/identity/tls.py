"""TLS between hosts: who is trusted now, and the contexts that let nobody else in.

Both sides compare the certificate itself. The server's list of peers can change at any moment: each handshake takes
the context of that moment, and every request looks its certificate up again, so that a removed peer is out at once
even on a connection it still holds.
"""

from __future__ import annotations

import hmac
import ssl
from collections.abc import Iterable

from hostler.identity.certificates import HostIdentity, fingerprint_of
from hostler.model.host import Peer


class Trust:
    """The peers of this host, by certificate."""

    def __init__(self, identity: HostIdentity, peers: Iterable[Peer] = ()) -> None:
        self.identity = identity
        self._peers: dict[str, Peer] = {}
        self._server = self._listening()
        self._entry = self._listening()
        self._entry.sni_callback = self._take_present_context
        self.replace(peers)

    def replace(self, peers: Iterable[Peer]) -> None:
        """From now on exactly these are trusted."""
        found = {fingerprint_of(ssl.PEM_cert_to_DER_cert(peer.certificate)): peer for peer in peers}
        context = self._listening()
        for peer in found.values():
            context.load_verify_locations(cadata=peer.certificate)
        self._peers, self._server = found, context

    def peer_of(self, der: bytes) -> Peer | None:
        """The peer whose certificate this is, exactly."""
        return self._peers.get(fingerprint_of(der))

    def server_context(self) -> ssl.SSLContext:
        """For the listener, for its whole life: TLS 1.3, a client certificate is optional, one that is not a trusted
        peer's ends the handshake."""
        return self._entry

    def client_context(self, fingerprint: str, certificate: str | None = None) -> ssl.SSLContext:
        """For connections to one host: it must present exactly the certificate with this fingerprint. Names are not
        looked at: the certificate says more than any name.

        `certificate` (PEM) is given for a peer that knows us, to whom our own is presented. Without it, for the first
        contact, the fingerprint of the invitation alone decides, and ours is not presented: a host that does not
        know it yet would end the handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        if certificate is None:
            context.verify_mode = ssl.CERT_NONE  # the pin below does the whole check
        else:
            context.load_verify_locations(cadata=certificate)
            context.load_cert_chain(self.identity.certificate_path, self.identity.key_path)
        context.sslobject_class = _pinned_object(fingerprint)
        context.sslsocket_class = _pinned_socket(fingerprint)
        return context

    def _listening(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_OPTIONAL
        # No tickets: a resumed session does not check the certificate again, and P-256 handshakes are cheap.
        context.num_tickets = 0
        context.load_cert_chain(self.identity.certificate_path, self.identity.key_path)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _take_present_context(
        self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext
    ) -> None:
        """OpenSSL calls this for each handshake, with or without a server name in it."""
        connection.context = self._server


def _must_match(presented: bytes | None, fingerprint: str) -> None:
    if presented is None or not hmac.compare_digest(fingerprint_of(presented), fingerprint):
        raise ssl.SSLCertVerificationError(1, "the other side is not the host it should be: wrong certificate")


def _pinned_object(fingerprint: str) -> type[ssl.SSLObject]:
    """asyncio and anyio do TLS through SSLObject; nothing is sent on it before `do_handshake` has returned."""

    class Pinned(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            _must_match(self.getpeercert(binary_form=True), fingerprint)

    return Pinned


def _pinned_socket(fingerprint: str) -> type[ssl.SSLSocket]:
    class Pinned(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            _must_match(self.getpeercert(binary_form=True), fingerprint)

    return Pinned
