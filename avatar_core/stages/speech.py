"""Speech: a text becomes a recording, an asset of the store like those that come from outside.

Its items stand beside those of ingest, since a clip is planned only once its length is known.
"""

from dataclasses import dataclass, field
from pathlib import Path

from avatar_core import weights
from avatar_core.config import Config, nearest
from avatar_core.errors import InputError, WeightsError, about
from avatar_core.media import kokoro
from avatar_core.media.audio import AudioLimits, probe_audio, write_wav
from avatar_core.stages.base import Item, ItemSpec, Output, Report, Stage
from avatar_core.stages.ingest import IngestStage
from avatar_core.store.keys import config_values, digest, item_key
from avatar_core.weights.ensure import write_once
from avatar_core.weights.record import hash_file

_TINY = "kokoro-tiny"


@dataclass(frozen=True)
class SpeechConfig:
    """`text` as one voice says it, or two in turns; the result is the recording of `speaker` alone."""

    text: str
    voices: tuple[str, ...]
    speaker: int
    min_duration_s: float
    max_duration_s: float
    checkpoint: str = field(default="kokoro", metadata={"execution": True})


class SpeechStage(Stage):
    name = "speech"
    noun = "text"
    guessed_seconds = 5.0
    version = 1
    folder = IngestStage.folder
    columns = IngestStage.columns

    def weights(self, config: SpeechConfig) -> tuple[str, ...]:
        return (f"{config.checkpoint}/model", f"{config.checkpoint}/voices")

    def load(self, config: SpeechConfig, device: str, memory: str | None) -> kokoro.Speaker:
        return kokoro.Speaker(*map(weights.locate, self.weights(config)))

    def process(
        self, item: Item, config: SpeechConfig, models: kokoro.Speaker, scratch: Path, report: Report
    ) -> Output:
        path = scratch / "asset.wav"
        with about("tts_text"):
            write_wav(path, models.tracks(config.text, config.voices)[config.speaker], kokoro.SAMPLE_RATE)
            probe = probe_audio(path, AudioLimits(config.max_duration_s, config.min_duration_s))
        columns = {
            "kind": SpeechStage.name,
            "format": probe.format,
            "bytes": path.stat().st_size,
            "sample_rate": probe.sample_rate,
            "channels": probe.channels,
            "duration_s": probe.duration_s,
        }
        return Output(columns, file=path)


def prepare(config: Config, voices: list[str]) -> None:
    """Raises `ConfigError` or `WeightsError`, with the command that helps, where what speaks is not here."""
    kokoro.check_installed(voices)
    checkpoint = config.tts.checkpoint
    if checkpoint == _TINY and not weights.present(_TINY):
        from avatar_core.media.kokoro_tiny import write_tiny_checkpoint

        write_once(weights.folder() / _TINY, write_tiny_checkpoint)
    if not weights.present(checkpoint):
        raise WeightsError(
            f"tts_text needs the weights {checkpoint!r}, which are not in {weights.folder() / checkpoint}; "
            f"run: {weights.remedy(checkpoint)}"
        )


def speech_item(text: str, voices: tuple[str, ...], speaker: int, config: Config) -> ItemSpec:
    """The item of one speaker's recording. Raises `InputError` for a voice that is not there."""
    checkpoint = config.tts.checkpoint
    settings = SpeechConfig(
        text, voices, speaker, config.audio.min_duration_s, config.input.max_duration_s, checkpoint
    )
    inputs = {
        "packages": kokoro.versions(voices),
        "voices": tuple(hash_file(_voice_file(voice, checkpoint)) for voice in voices),
    }
    fingerprint = weights.fingerprint(f"{checkpoint}/model")
    key = item_key(
        SpeechStage.name, SpeechStage.version, digest(config_values(settings)), fingerprint, inputs
    )
    return ItemSpec(key, settings)


def _voice_file(voice: str, checkpoint: str) -> Path:
    folder = weights.locate(f"{checkpoint}/voices")
    path = folder / f"{voice}.pt"
    if not path.is_file():
        known = sorted(each.stem for each in folder.glob("*.pt"))
        raise InputError(
            f"no voice is called `{voice}`; weights {checkpoint}/voices hold: {', '.join(known)}"
            f"{nearest(voice, known)}"
        )
    return path
