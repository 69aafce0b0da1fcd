"""The three emoji sets that the embedded models are trained on.

`npm pack` fetches the art from the npm registry at pinned versions. It is drawn on white at 64 x 64
and stored in one compressed array. No art is shipped with etude, only models that were trained on
it.

| package                    | version | style     | licence of the art                  |
| -------------------------- | ------- | --------- | ----------------------------------- |
| emoji-datasource-google    | 16.0.0  | `noto`    | Noto Emoji: Apache-2.0 / OFL-1.1    |
| emoji-datasource-twitter   | 16.0.0  | `twemoji` | Twemoji: CC-BY-4.0                  |
| @lobehub/fluent-emoji-3d   | 1.1.0   | `3d`      | Microsoft Fluent Emoji: MIT         |
| emojibase-data             | 17.0.0  | names     | MIT                                 |
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = 64
STYLES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/"),
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/"),
}
NAMES_PACKAGE = "emojibase-data@17.0.0"


@dataclass(frozen=True)
class EmojiSet:
    """Pictures with their names.

    Attributes:
        images: uint8 `[n, 3, 64, 64]`.
        emoji: int64 `[n]`, the index in `names` of the emoji that each picture shows.
        styles: `n` art styles, one of `STYLES`.
        names: one English name per emoji (Unicode CLDR), all different.
        tags: keywords per emoji.
        is_flag: whether each emoji is a country flag (hard to name from a small picture).
    """

    images: np.ndarray
    emoji: np.ndarray
    styles: list[str]
    names: list[str]
    tags: list[list[str]]
    is_flag: np.ndarray

    def held_out(self, fraction: float, seed: int) -> np.ndarray:
        """Bool `[n]`: pictures of a random `fraction` of the emoji, with all styles of each."""
        rng = np.random.default_rng(seed)
        emoji = rng.permutation(len(self.names))[: round(fraction * len(self.names))]
        return np.isin(self.emoji, emoji)


def load_emoji(cache: Path) -> EmojiSet:
    """Fetches (once, 155 MB) and decodes the three sets; later calls read `cache/emoji-64.npz`."""
    arrays, labels = cache / "emoji-64.npz", cache / "emoji-64.json"
    if not (arrays.exists() and labels.exists()):
        _build(cache, arrays, labels)
    with np.load(arrays, allow_pickle=False) as data:
        images, emoji, is_flag = data["images"], data["emoji"], data["is_flag"]
    text = json.loads(labels.read_text())
    return EmojiSet(images, emoji, text["styles"], text["names"], text["tags"], is_flag)


def _build(cache: Path, arrays: Path, labels: Path) -> None:
    entries = _read_names(_fetch(NAMES_PACKAGE, cache))
    index = {code: i for i, (code, *_) in enumerate(entries)}
    images, emoji, styles = [], [], []
    for style, (package, folder) in STYLES.items():
        for code, picture in _read_pictures(_fetch(package, cache), folder):
            if code in index:
                images.append(picture)
                emoji.append(index[code])
                styles.append(style)
    order = np.lexsort((np.array([list(STYLES).index(s) for s in styles]), np.array(emoji)))
    np.savez_compressed(
        arrays,
        images=np.stack(images)[order],
        emoji=np.array(emoji)[order],
        is_flag=np.array([flag for *_, flag in entries]),
    )
    text = {
        "styles": [styles[i] for i in order],
        "names": [name for _, name, _, _ in entries],
        "tags": [tags for _, _, tags, _ in entries],
    }
    labels.write_text(json.dumps(text))


def _fetch(package: str, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    name, version = package.rsplit("@", 1)
    archive = cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            raise RuntimeError(f"fetching {package} needs `npm` on the PATH: install Node.js and run this again")
        subprocess.run(["npm", "pack", package], cwd=cache, check=True, capture_output=True)
    return archive


def _code_point_key(code: str) -> str:
    """One spelling per emoji: lower case, without the variation selector.

    The sets do not agree on that selector.
    """
    return code.lower().replace("-fe0f", "")


def _read_names(archive: Path) -> list[tuple[str, str, list[str], bool]]:
    with tarfile.open(archive) as tar:
        file = tar.extractfile("package/en/data.json")
        assert file is not None
        entries = json.load(file)
    flags_group = 9
    return [
        (
            _code_point_key(e["hexcode"]),
            e["label"].lower(),
            [t.lower() for t in e.get("tags", [])],
            e["group"] == flags_group and e["label"].startswith("flag: "),
        )
        for e in entries
        if "group" in e
    ]


def _read_pictures(archive: Path, folder: str) -> list[tuple[str, np.ndarray]]:
    pictures = []
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.name.startswith(folder) and path.suffix in {".png", ".webp"}:
                file = tar.extractfile(member)
                assert file is not None
                pictures.append((_code_point_key(path.stem), _draw_on_white(file.read())))
    return pictures


def _draw_on_white(data: bytes) -> np.ndarray:
    """uint8 `[3, 64, 64]` of an RGBA picture of any size."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB")).transpose(2, 0, 1).copy()
