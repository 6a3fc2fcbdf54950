"""Mutants that no test can notice, and why."""

SAME = "the same images in the same order either way"

EXPLAINED: dict[str, dict[str, str]] = {
    "storage/images/rows.py": {
        "limited: LtE in len(rows.keys) <= limit -> Lt in len(rows.keys) <= limit": SAME,
        "_fix: min -> max": "more seeds are tried, which takes longer and advises the same one",
        "by_key: Lt in _hashes(keys, seed) < limit -> LtE in _hashes(keys, seed) < limit": "no known hash is it",
        "by_key: Lt in limit < 2 ** 64 -> LtE in limit < 2 ** 64": "NumPy finds every number below one it cannot hold",
    },
    "storage/functaset/quantizer.py": {
        f"_range: True -> False{number}": "of two numbers that are added, the other one keeps the axes"
        for number in ("", " #2", " #4", " #5")
    }
    | {
        "Quantizer._code: False -> True": "a copy more",
        "Quantizer._code: LtE in np.abs(position, out=position) <= np.float32(0.5 - NEAR) -> Lt in "
        "np.abs(position, out=position) <= np.float32(0.5 - NEAR)": "one more is computed twice",
        "Quantizer._steps_per_unit: Gt in found > 1e-30 -> GtE in found > 1e-30": "its precision suffices either way",
        "Quantizer._steps_per_unit: Lt in found < 1e+30 -> LtE in found < 1e+30": "its precision suffices either way",
        "Quantizer._steps_per_unit: BitAnd in (found > 1e-30) & (found < 1e+30) -> BitOr in (found > 1e-30) & "
        "(found < 1e+30)": "what overflows or is zero gives a position that is computed again",
        "Quantizer._steps_per_unit: 1e+30 -> 1e+30": "the same number",
        ": LShift in 1 << 16 -> RShift in 1 << 16": "a row at a time",
        "Quantizer.outside: 1 -> 2": "of the shape (n, -1), which NumPy completes either way",
        "_parts: 1 -> 2 #2": "fewer rows at a time, of latents of one number",
        "refuse_clipping: 1 -> 2": "of a single number the share is not counted",
    },
    "storage/functaset/commit.py": {
        "_kept_names: True -> False": "lists of one length",
        "_kept_names: True -> False #2": "lists of one length",
        "_retiring: LtE in rows <= set(before) -> Lt in rows <= set(before)": "the same entry is made again",
        "_rows_shown: True -> False": "lists of one length",
        "_retired_ids: True -> False": "lists of one length",
        "_retired_ids:  for shard in fragment.shards if shard.retired.any() ->  for shard in fragment.shards": (
            "of the others no row is retired"
        ),
    },
    "storage/functaset/committing/overlap.py": {
        ": Sub in (1 << 31) - 1 -> Add in (1 << 31) - 1": "no augmentation has a number beyond either",
        "refuse_overlap:  for entry in proposal.fragments if entry.fragment in new ->  for entry in proposal."
        "fragments": "a split without new fragments has none to compare",
        "refuse_overlap: Gt in len(entries) > 1 -> GtE in len(entries) > 1": "compared with nothing",
    },
    "storage/functaset/committing/finished.py": {
        "make_manifest: And in blocks is not None and moments is not None -> Or in blocks is not None and moments is "
        "not None": "both are there, or neither",
        "Blocks.add: Add in self.count += 1 -> Sub in self.count += 1": "a multiple of the size at the same shards",
    },
    "storage/functaset/committing/split_moments.py": {
        "training_moments: IsNot in stored is not None -> Is in stored is not None": "merged again, to the same bytes",
        "_parts: 1 -> 2": "of the shape (-1, n), which NumPy completes either way",
    },
    "tasks/evaluation/gate.py": {
        "Verdict.passed: 'min_' -> 'min'": "every key of a lower limit begins with both",
    },
}
