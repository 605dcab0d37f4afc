"""The kinds of terminal problems. The one place to change a question; any change changes the problem behind an index.

Each draft must hold, and tests see to it: nothing wanted is there at first, and the solution makes all of it.
"""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections import Counter

from envs.terminal.problem import Kind, Problem

WORDS = (
    "amber", "anvil", "basil", "birch", "cedar", "cobalt", "coral", "delta", "ember", "fable", "fjord", "garnet",
    "hazel", "indigo", "jasper", "kelp", "lotus", "maple", "nickel", "onyx", "pearl", "quartz", "raven", "sable",
    "tulip", "umber", "violet", "walnut", "yarrow", "zephyr",
)  # fmt: skip
LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "FATAL")
SIZES = {1: 8, 2: 40, 3: 160}


def _name(draw: random.Random) -> str:
    return f"{draw.choice(WORDS)}-{draw.randrange(100, 1000)}"


def _names(draw: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_name(draw)] = None
    return list(found)


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def log_count(draw: random.Random, level: int) -> Problem:
    """Count the lines of a level, of one service from level 2 on."""
    services = _names(draw, 3)
    rows = [(draw.choice(LEVELS), draw.choice(services)) for _ in range(SIZES[level] * 3 + draw.randrange(20))]
    wanted, service = draw.choice(LEVELS), services[0]
    lines = [
        f"2026-03-{draw.randrange(1, 29):02} {each} [{origin}] {draw.choice(WORDS)} {draw.choice(LEVELS).lower()}"
        for each, origin in rows
    ]
    if level == 1:
        number = sum(each == wanted for each, _ in rows)
        asked, pattern = f"lines of level {wanted} in app.log", f" {wanted} "
    else:
        number = sum(row == (wanted, service) for row in rows)
        asked, pattern = f"lines of level {wanted} that come from {service} in app.log", f" {wanted} [{service}] "
    out = f"{_name(draw)}.txt"
    return Problem(
        f"Write the number of {asked} to the file {out}, and nothing else into it.",
        {"app.log": _text(lines)},
        {out: str(number)},
        [f"grep -cF '{pattern}' app.log > {out}"],
    )


def top_client(draw: random.Random, level: int) -> Problem:
    """The most frequent clients of an access log, with their counts."""
    clients = [f"10.{draw.randrange(256)}.{draw.randrange(256)}.{draw.randrange(1, 255)}" for _ in range(6)]
    rows = [client for place, client in enumerate(clients) for _ in range((place + 1) * 2 + draw.randrange(2))]
    draw.shuffle(rows)
    lines = [f'{client} - - "GET /{draw.choice(WORDS)}" {draw.choice((200, 404, 500))}' for client in rows]
    most = Counter(rows).most_common(level)
    out = f"{_name(draw)}.txt"
    asked = "client address" if level == 1 else f"{level} client addresses"
    return Problem(
        f"Write the {asked} with the most requests in access.log to {out}: one a line, as ADDRESS COUNT, "
        "most requests first.",
        {"access.log": _text(lines)},
        {out: "\n".join(f"{client} {count}" for client, count in most)},
        [f"cut -d' ' -f1 access.log | sort | uniq -c | sort -rn | head -n {level} | awk '{{print $2, $1}}' > {out}"],
    )


def table_sum(draw: random.Random, level: int) -> Problem:
    """Sum a column of a table over one region."""
    regions = _names(draw, 3)
    rows = [(draw.choice(regions), draw.randrange(1, 500), draw.randrange(1, 90)) for _ in range(SIZES[level])]
    rows.append((regions[0], draw.randrange(1, 500), draw.randrange(1, 90)))
    out = f"{_name(draw)}.txt"
    times = level == 3
    total = sum(amount * (price if times else 1) for region, amount, price in rows if region == regions[0])
    asked = "amount times price" if times else "the amounts"
    value = "$2*$3" if times else "$2"
    return Problem(
        f"sales.csv has the columns region, amount and price. Write the sum of {asked} of the region {regions[0]} "
        f"to {out}, as one integer.",
        {"sales.csv": _text(["region,amount,price", *(f"{a},{b},{c}" for a, b, c in rows)])},
        {out: str(total)},
        [f"awk -F, '$1==\"{regions[0]}\" {{s+={value}}} END {{print s}}' sales.csv > {out}"],
    )


def rename(draw: random.Random, level: int) -> Problem:
    """Give files of one ending another one, in folders from level 2 on."""
    old, new = draw.sample(("txt", "md", "log", "dat", "bak"), 2)
    folders = ["docs"] if level == 1 else [f"docs/{name}" for name in _names(draw, level)]
    files: dict[str, bytes] = {}
    wanted: dict[str, str | None] = {}
    for folder in folders:
        for place, name in enumerate(_names(draw, 4)):
            data = f"{_name(draw)}\n"
            if place < 3:
                files[f"{folder}/{name}.{old}"] = data.encode()
                wanted |= {f"{folder}/{name}.{old}": None, f"{folder}/{name}.{new}": data}
            else:
                files[f"{folder}/{name}.cfg"] = data.encode()
    return Problem(
        f"Rename every file under docs that ends in .{old} so that it ends in .{new} instead. Leave all else alone.",
        files,
        wanted,
        [f'find docs -name \'*.{old}\' | while read -r f; do mv "$f" "${{f%.{old}}}.{new}"; done'],
    )


def remove_large(draw: random.Random, level: int) -> Problem:
    """Delete the files above a size, and only those."""
    bound = draw.randrange(300, 900)
    files: dict[str, bytes] = {}
    wanted: dict[str, str | None] = {}
    for place, name in enumerate(_names(draw, 4 + 3 * level)):
        path = "cache/" + "/".join(_names(draw, draw.randrange(level))) + f"/{name}.bin"
        path = path.replace("//", "/")
        size = bound + draw.randrange(1, 200) if place % 2 == 0 else bound - draw.randrange(0, 200)
        files[path] = bytes(draw.choices(b"abcdefgh\n", k=size))
        if size > bound:
            wanted[path] = None
    return Problem(
        f"Delete every file under cache that is larger than {bound} bytes. Leave all others alone.",
        files,
        wanted,
        [f"find cache -type f -size +{bound}c -delete"],
    )


def replace_setting(draw: random.Random, level: int) -> Problem:
    """Change one value in several configuration files, whole words only."""
    old, new = _names(draw, 2)
    files: dict[str, bytes] = {}
    wanted: dict[str, str | None] = {}
    for place, name in enumerate(_names(draw, 2 + level)):
        lines = [f"{key} = {draw.choice((f'{draw.choice(WORDS)}', f'{old}x'))}" for key in _names(draw, 2 * level)]
        if place != 1:
            lines.insert(draw.randrange(len(lines) + 1), f"host = {old}")
        path = f"etc/{name}.conf"
        files[path] = _text(lines)
        if place != 1:
            wanted[path] = "\n".join(f"host = {new}" if line == f"host = {old}" else line for line in lines)
    return Problem(
        f"In the .conf files under etc, change every line `host = {old}` to `host = {new}`. Change no other line.",
        files,
        wanted,
        [f"sed -i 's/^host = {old}$/host = {new}/' etc/*.conf"],
    )


def merge_lists(draw: random.Random, level: int) -> Problem:
    """Merge lists, sorted, without doubles."""
    pool = _names(draw, 6 * level + 4)
    lists = {f"lists/{name}.txt": draw.sample(pool, len(pool) // 2 + 1) for name in _names(draw, 1 + level)}
    out = f"{_name(draw)}.txt"
    if level == 3:
        counts = Counter(word for words in lists.values() for word in words)
        merged, asked, command = sorted(w for w, n in counts.items() if n > 1), "that occur in more than one", "uniq -d"
    else:
        merged, asked, command = sorted({w for words in lists.values() for w in words}), "of all", "uniq"
    return Problem(
        f"Write the words {asked} of the files in lists to {out}: one a line, each once, in alphabetical order.",
        {path: _text(words) for path, words in lists.items()},
        {out: "\n".join(merged)},
        [f"LC_ALL=C sort lists/*.txt | {command} > {out}"],
    )


def executables(draw: random.Random, level: int) -> Problem:
    """Make the scripts executable that begin with a shebang line, and nothing else."""
    files, marked = {}, set()
    for place, name in enumerate(_names(draw, 3 + 2 * level)):
        path = f"bin/{name}" + draw.choice(("", ".sh", ".txt"))
        script = place % 2 == 0
        files[path] = _text(["#!/bin/sh" if script else f"# {draw.choice(WORDS)}", f"echo {_name(draw)}"])
        if script:
            marked.add(path)
    return Problem(
        "Make every file in bin executable whose first line is `#!/bin/sh`. No other file may become executable.",
        files,
        {},
        ['for f in bin/*; do [ "$(head -n 1 "$f")" = \'#!/bin/sh\' ] && chmod u+x "$f"; done'],
        executable=frozenset(marked),
    )


def archive(draw: random.Random, level: int) -> Problem:
    """Find one file of an archive, which from level 2 on lies in another archive, and put its text somewhere."""
    wanted, *others = _names(draw, 2 + 2 * level)
    text = f"{_name(draw)} {_name(draw)}"
    contents = {f"data/{name}.txt": f"{_name(draw)}\n".encode() for name in others}
    contents[f"data/{wanted}.txt"] = f"{text}\n".encode()
    packed = _tar_gz(dict(sorted(contents.items())))
    where = "backup.tar.gz"
    solution = ["tar xzf backup.tar.gz -C /tmp"]
    if level > 1:
        packed = _tar_gz({"inner.tar.gz": packed, "README": f"{_name(draw)}\n".encode()})
        where = "the archive inner.tar.gz in backup.tar.gz"
        solution.append("tar xzf /tmp/inner.tar.gz -C /tmp")
    out = f"{_name(draw)}/{wanted}.txt"
    return Problem(
        f"There is a file {wanted}.txt in {where}. Put a copy of it at {out}; make the folder. "
        "Leave backup.tar.gz alone.",
        {"backup.tar.gz": packed},
        {out: text},
        [*solution, f"mkdir {out.split('/')[0]} && cp /tmp/data/{wanted}.txt {out}"],
    )


def _tar_gz(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data in contents.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), mtime=0)


WORKER = b"""job=$1 key=$2
trap 'echo "$key" > "jobs/$job.stopped"; exit 0' TERM
: > "/tmp/$job.ready"
sleep 100000 </dev/null >/dev/null 2>&1 &
wait $!
"""


def stop_job(draw: random.Random, level: int) -> Problem:
    """Stop one running job of several with SIGTERM; only it can then write its key, which is in no file."""
    jobs = _names(draw, 1 + level)
    keys = {job: f"{draw.getrandbits(64):016x}" for job in jobs}
    job = draw.choice(jobs)
    start = "; ".join(f"sh jobs/worker.sh {each} {keys[each]} </dev/null >/dev/null 2>&1 &" for each in jobs)
    # A job that gets its signal before it has set its trap would just die.
    ready = " ".join(f"while ! rm /tmp/{each}.ready 2>/dev/null; do sleep 0.01; done;" for each in jobs)
    wanted: dict[str, str | None] = {f"jobs/{each}.stopped": None for each in jobs if each != job}
    return Problem(
        f"Several jobs are running as `sh jobs/worker.sh NAME KEY`. Stop the job {job}, and no other, with SIGTERM; "
        f"upon that it writes its key to jobs/{job}.stopped. Make sure that it did.",
        {"jobs/worker.sh": WORKER},
        {**wanted, f"jobs/{job}.stopped": keys[job]},
        [f"pkill -TERM -f 'worker.sh {job} ' && while [ ! -s jobs/{job}.stopped ]; do sleep 0.02; done"],
        background=f"{start.replace('&;', '&')} {ready}",
    )


KINDS = tuple(
    Kind(draft.__name__, draft)
    for draft in (
        log_count, top_client, table_sum, rename, remove_large, replace_setting, merge_lists, executables, archive,
        stop_job,
    )
)  # fmt: skip
