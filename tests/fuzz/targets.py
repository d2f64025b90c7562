"""What is fuzzed, by name."""

from tests.fuzz import attacks, files, ops, words

TARGETS = {
    "ops": ops.OPS,
    "attacks": attacks.ATTACKS,
    "attack names": words.ATTACKS,
    "commands": words.COMMANDS,
    "options": words.OPTIONS,
    "sizes": words.TRAIN_SIZES,
    "files": files.FILES,
}
