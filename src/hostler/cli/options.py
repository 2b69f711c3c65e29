"""Arguments and options that several commands share."""

from __future__ import annotations

import click

from hostler.cli import completing

complete_volumes = completing.volume_names
VM = click.argument("vm", shell_complete=completing.vm_names)
VOLUME = click.argument("volume", shell_complete=completing.volume_names)
POOL = click.argument("pool", shell_complete=completing.pool_names)
HOST = click.argument("host", shell_complete=completing.host_names)
JOB = click.argument("job", shell_complete=completing.job_ids)

WAIT = click.option("--wait/--no-wait", default=True, help="Wait until it is done (default), or print the job and go.")
YES = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would be done.")
IN_POOL = click.option(
    "--pool", metavar="POOL", shell_complete=completing.pool_names, help="Pool to make it in [default]."
)
