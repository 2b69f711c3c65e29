"""A small iSCSI initiator of our own: log in, ask for targets, LUNs, their names and sizes. It never writes a block.

RFC 7143 (numbers in the code are its sections), SPC-4 and SBC-3 for the SCSI commands. Own instead of libiscsi's tools,
because those print sizes rounded, tell errors as prose, and want the CHAP secret in their environment. What a target
sends is hostile input: every length is bounded; deadlines are the caller's.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from hostler.model.errors import HostLacks, HostlerError, NotFound, NotPermitted
from hostler.storage.pools.dial import connect

MAX_SEGMENT = 256 * 1024
"""Bytes of one data segment that we declare to take."""
MAX_TEXT = 1024**2
"""Bytes of the list of targets."""
_NONE = 0xFFFF_FFFF
_SECURITY, _OPERATIONAL, _FULL = 0, 1, 3
_FINAL, _CONTINUE = 0x80, 0x40
_GOOD, _CHECK_CONDITION = 0x00, 0x02
_UNIT_ATTENTION = 0x06
_TRIES = 5
"""A target tells news (power on, LUNs changed) by failing one command for each."""

LOGIN, LOGIN_ANSWER = 0x03, 0x23
TEXT, TEXT_ANSWER = 0x04, 0x24
COMMAND, COMMAND_ANSWER, DATA_IN = 0x01, 0x21, 0x25
LOGOUT, LOGOUT_ANSWER = 0x06, 0x26
NOP_OUT, NOP_IN, ASYNC = 0x00, 0x20, 0x32


@dataclass(frozen=True, slots=True)
class Login:
    """Who logs in, where. `target` None: a discovery session. `secret` only with `user`."""

    initiator: str
    target: str | None = None
    user: str = ""
    secret: str = ""

    def __repr__(self) -> str:
        return f"Login({self.initiator!r}, {self.target!r}, {self.user!r})"


@dataclass(frozen=True, slots=True)
class Pdu:
    """One protocol data unit: its 48 bytes of header, its data."""

    header: bytes
    data: bytes

    @property
    def opcode(self) -> int:
        """Without the bit for immediate delivery."""
        return self.header[0] & 0x3F

    @property
    def flags(self) -> int:
        return self.header[1]

    def word(self, at: int) -> int:
        """The 32-bit number at that place of the header."""
        return int(struct.unpack_from(">I", self.header, at)[0])


class Refused(Exception):
    """A SCSI command failed. `key`: its sense key, None where the target gave none."""

    def __init__(self, status: int, key: int | None) -> None:
        self.status, self.key = status, key
        super().__init__(f"SCSI status {status:#x}, sense key {key}")


def portal_parts(portal: str) -> tuple[str, int]:
    """ "[fd00::5]:3260" as address and port."""
    host, _, port = portal.rpartition(":")
    return host.strip("[]"), int(port)


@asynccontextmanager
async def session(portal: str, login: Login) -> AsyncIterator[Session]:
    """A session that is logged in, logged out at the end of the block. NotFound where nobody listens or the target is
    not known, NotPermitted where the log-in is refused, HostLacks for a target that wants what we have not."""
    subject = f"iSCSI portal {portal}"
    host, port = portal_parts(portal)
    reader, writer = await connect(subject, host, port)
    try:
        opened = Session(subject, reader, writer)
        await opened.log_in(login)
        yield opened
        with suppress(OSError, EOFError, TimeoutError, HostlerError):
            async with asyncio.timeout(2):
                await opened.log_out()
    except (OSError, EOFError) as error:
        raise NotFound(subject, "broke off the connection", "look at the storage system") from error
    finally:
        writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(2):
                await writer.wait_closed()


class Session:
    """One connection of one session, one command at a time."""

    def __init__(self, subject: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._subject = subject
        self._reader = reader
        self._writer = writer
        self._isid = b"\x80" + secrets.token_bytes(5)  # 11.12.5: 0x80, "random"
        self._tsih = 0
        self._task = 0
        self._cmd_sn = 1
        self._exp_stat_sn = 0

    # logging in

    async def log_in(self, login: Login) -> None:
        """Both stages (6.3). Offers CHAP only where there is a secret; a target that wants none is taken as it is."""
        words = {
            "InitiatorName": login.initiator,
            "SessionType": "Normal" if login.target else "Discovery",
            **({"TargetName": login.target} if login.target else {}),
            "AuthMethod": "CHAP,None" if login.user else "None",
        }
        answer, flags = await self._login(words, _SECURITY, transit=not login.user)
        if answer.get("AuthMethod") == "CHAP":
            answer, flags = await self._chap(login)
        elif not flags & _FINAL:
            answer, flags = await self._login({}, _SECURITY, transit=True)
        if not flags & _FINAL:
            raise self._odd("does not end the log-in")
        await self._negotiate(login.target is not None)

    async def _chap(self, login: Login) -> tuple[dict[str, str], int]:
        """RFC 1994 with MD5 (13.1.4): the one algorithm that every target has."""
        asked, _ = await self._login({"CHAP_A": "5"}, _SECURITY, transit=False)
        try:
            number, challenge = int(asked["CHAP_I"]), _binary(asked["CHAP_C"])
        except (KeyError, ValueError) as error:
            raise self._odd("sends no CHAP challenge") from error
        response = hashlib.md5(bytes([number & 0xFF]) + login.secret.encode() + challenge, usedforsecurity=False)
        words = {"CHAP_N": login.user, "CHAP_R": "0x" + response.hexdigest()}
        return await self._login(words, _SECURITY, transit=True)

    async def _negotiate(self, normal: bool) -> None:
        words = {"HeaderDigest": "None", "DataDigest": "None", "MaxRecvDataSegmentLength": str(MAX_SEGMENT)}
        words |= {"DefaultTime2Wait": "2", "DefaultTime2Retain": "0", "ErrorRecoveryLevel": "0"}
        if normal:
            words |= {"InitialR2T": "Yes", "ImmediateData": "No", "MaxConnections": "1", "MaxOutstandingR2T": "1"}
            words |= {"MaxBurstLength": str(MAX_SEGMENT), "FirstBurstLength": "65536"}
            words |= {"DataPDUInOrder": "Yes", "DataSequenceInOrder": "Yes"}
        for _ in range(_TRIES):
            _, flags = await self._login(words, _OPERATIONAL, transit=True)
            if flags & _FINAL and flags & 3 == _FULL:
                return
            words = {}
        raise self._odd("does not end the log-in")

    async def _login(self, words: Mapping[str, str], stage: int, transit: bool) -> tuple[dict[str, str], int]:
        after = _OPERATIONAL if stage == _SECURITY else _FULL
        flags = (_FINAL | after if transit else 0) | stage << 2
        head = struct.pack(">BBBB", 0x40 | LOGIN, flags, 0, 0) + bytes(4) + self._isid + struct.pack(">H", self._tsih)
        await self._send(head + struct.pack(">IHHII", self._task, 0, 0, self._cmd_sn, self._exp_stat_sn), _text(words))
        answer = await self._receive(LOGIN_ANSWER)
        if answer.header[36]:
            raise self._login_refused(answer.header[36], answer.header[37])
        self._exp_stat_sn = (answer.word(24) + 1) & _NONE
        self._tsih = struct.unpack_from(">H", answer.header, 14)[0]
        if answer.flags & _CONTINUE:
            raise self._odd("sends more in its log-in than we take")
        return _words(answer.data), answer.flags

    def _login_refused(self, status: int, detail: int) -> HostlerError:
        """11.13.5."""
        if (status, detail) in ((2, 1), (2, 2)):
            return NotPermitted(
                self._subject,
                "refuses the log-in: "
                + ("wrong CHAP name or secret" if detail == 1 else "this initiator may not use the target"),
                "check the pool's CHAP user and secret, and which initiators the target lets in",
            )
        if (status, detail) == (2, 3):
            return NotFound(self._subject, "knows no such target", "list them with 'hostler pool discover'")
        if status == 1:
            return HostLacks(self._subject, "sends us to another portal", "give that one as the portal")
        return HostLacks(self._subject, f"refuses the log-in (status {status:#04x}{detail:02x})", "see its own log")

    async def log_out(self) -> None:
        """End the session (11.14)."""
        head = struct.pack(">BB", 0x40 | LOGOUT, _FINAL) + bytes(14)
        await self._send(head + struct.pack(">IIII", self._next_task(), 0, self._cmd_sn, self._exp_stat_sn))
        await self._receive(LOGOUT_ANSWER)

    # asking

    async def targets(self) -> dict[str, list[str]]:
        """Targets of this portal, each with its portals (appendix C)."""
        said = await self._send_targets()
        found: dict[str, list[str]] = {}
        name = ""
        for word in said.split(b"\0"):
            key, _, value = word.decode("utf-8", "replace").partition("=")
            if key == "TargetName":
                name = value
                found[name] = []
            elif key == "TargetAddress" and name:
                found[name].append(value.rpartition(",")[0] or value)
        return found

    async def _send_targets(self) -> bytes:
        said, tag, words = b"", _NONE, b"SendTargets=All\0"
        while len(said) <= MAX_TEXT:
            head = struct.pack(">BB", TEXT, _FINAL) + bytes(14)
            numbers = struct.pack(">IIII", self._next_task(), tag, self._cmd_sn, self._exp_stat_sn)
            await self._send(head + numbers, words)
            self._cmd_sn += 1
            answer = await self._receive(TEXT_ANSWER)
            self._exp_stat_sn = (answer.word(24) + 1) & _NONE
            said += answer.data
            if answer.flags & _FINAL:
                return said
            tag, words = answer.word(20), b""
        raise self._odd(f"sends more than {MAX_TEXT} bytes of targets")

    async def command(self, lun: int, cdb: bytes, expect: int) -> bytes:
        """What a reading SCSI command answers, at most `expect` bytes. Refused when it fails."""
        for last in range(_TRIES):
            try:
                return await self._command(lun, cdb, expect)
            except Refused as error:
                if error.key != _UNIT_ATTENTION or last == _TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    async def _command(self, lun: int, cdb: bytes, expect: int) -> bytes:
        place = struct.pack(">H", lun if lun < 256 else 0x4000 | lun) + bytes(6)  # SAM-5, 4.7: peripheral, flat
        head = struct.pack(">BB", COMMAND, _FINAL | 0x40 | 1) + bytes(6) + place
        numbers = struct.pack(">IIII", self._next_task(), expect, self._cmd_sn, self._exp_stat_sn)
        await self._send(head + numbers + cdb.ljust(16, b"\0"))
        self._cmd_sn += 1
        data = bytearray(expect)
        reach = 0
        while True:
            answer = await self._receive(DATA_IN, COMMAND_ANSWER)
            if answer.opcode == DATA_IN:
                at = answer.word(40)
                if at + len(answer.data) > expect:
                    raise self._odd("sends more than was asked for")
                data[at : at + len(answer.data)] = answer.data
                reach = max(reach, at + len(answer.data))
                if not answer.flags & 1:
                    continue
            self._exp_stat_sn = (answer.word(24) + 1) & _NONE
            if answer.header[3] != _GOOD:
                raise Refused(answer.header[3], _sense_key(answer))
            return bytes(data[:reach])

    # the wire

    def _next_task(self) -> int:
        self._task += 1
        return self._task

    async def _send(self, header: bytes, data: bytes = b"") -> None:
        full = bytearray(header.ljust(48, b"\0"))
        full[4:8] = struct.pack(">I", len(data))
        self._writer.write(bytes(full) + data + bytes(-len(data) % 4))
        await self._writer.drain()

    async def _receive(self, *wanted: int) -> Pdu:
        while True:
            header = await self._reader.readexactly(48)
            length = int.from_bytes(header[5:8], "big")
            if length > MAX_SEGMENT or header[4]:
                raise self._odd("does not speak iSCSI as we know it")
            data = (await self._reader.readexactly(length + -length % 4))[:length]
            pdu = Pdu(header, data)
            if pdu.opcode in wanted:
                return pdu
            if pdu.opcode == NOP_IN:
                await self._pong(pdu)
            elif pdu.opcode != ASYNC:
                raise self._odd(f"answers with an unexpected message ({pdu.opcode:#x})")

    async def _pong(self, ping: Pdu) -> None:
        if ping.word(20) == _NONE:
            return
        head = struct.pack(">BB", 0x40 | NOP_OUT, _FINAL) + bytes(6) + ping.header[8:16]
        await self._send(head + struct.pack(">IIII", _NONE, ping.word(20), self._cmd_sn, self._exp_stat_sn))

    def _odd(self, cause: str) -> HostLacks:
        return HostLacks(self._subject, cause, "check that it is an iSCSI portal")


def _text(words: Mapping[str, str]) -> bytes:
    return b"".join(f"{key}={value}\0".encode() for key, value in words.items())


def _words(data: bytes) -> dict[str, str]:
    pairs = (word.decode("utf-8", "replace").partition("=") for word in data.split(b"\0") if word)
    return {key: value for key, _, value in pairs}


def _binary(text: str) -> bytes:
    """Numbers of any length (6.1): hexadecimal or base 64."""
    if text[:2] in ("0x", "0X"):
        digits = text[2:]
        return bytes.fromhex(digits.zfill(len(digits) + len(digits) % 2))
    if text[:2] in ("0b", "0B"):
        import base64  # noqa: PLC0415 - no target known to us sends it

        return base64.b64decode(text[2:], validate=True)
    raise ValueError("neither hexadecimal nor base 64")


def _sense_key(answer: Pdu) -> int | None:
    """SPC-4, 4.5: byte 2 of the fixed format (0x70, 0x71), byte 1 of the descriptor format (0x72, 0x73)."""
    sense = answer.data[2:]
    if answer.header[3] != _CHECK_CONDITION or len(sense) < 3:
        return None
    return sense[2] & 0x0F if sense[0] & 0x7F in (0x70, 0x71) else sense[1] & 0x0F
