"""`data.pairs` from the user's files."""

from llmtrain.config.data import PreferenceFile
from llmtrain.data.input_files import JsonLine, Refused, fault_of, matching_files, read_json_lines
from llmtrain.data.preferences import PairText

FIELDS = ("prompt", "chosen", "rejected")


def read_pairs(pairs: PreferenceFile) -> tuple[list[PairText], list[Refused], int]:
    """The pairs of the files in order, the refused records, and the number of duplicates left out.

    Refused: malformed lines, missing fields, texts that are empty or no strings, answers that are equal but for white
    space (ties) or that both repeat the prompt, and pairs that other lines contradict by preferring the other answer.
    Raises DataError for a missing file, a glob without a match, or a file that is not UTF-8.
    """
    records = [_pair(line) for path in matching_files(pairs.paths) for line in read_json_lines(path)]
    refused = [record for record in records if isinstance(record, Refused)]
    first_place: dict[tuple[str, str, str], str] = {}
    for record in records:
        if isinstance(record, PairText):
            first_place.setdefault((record.prompt, record.chosen, record.rejected), record.where)
    kept: list[PairText] = []
    num_duplicates = 0
    for record in records:
        if isinstance(record, Refused):
            continue
        opposite = first_place.get((record.prompt, record.rejected, record.chosen))
        if opposite:
            refused.append(Refused(record.where, f"prefers what {opposite} rejects, for the same prompt"))
        elif first_place[record.prompt, record.chosen, record.rejected] == record.where:
            kept.append(record)
        else:
            num_duplicates += 1
    return kept, refused, num_duplicates


def _pair(line: JsonLine | Refused) -> PairText | Refused:
    if isinstance(line, Refused):
        return line
    for name in FIELDS:
        if name not in line.fields:
            return Refused(line.where, f"has no field '{name}'")
        if fault := fault_of(line.fields[name]):
            return Refused(line.where, f"'{name}' {fault}")
    prompt, chosen, rejected = (line.fields[name] for name in FIELDS)
    if chosen.strip() == rejected.strip():
        return Refused(line.where, "is a tie: 'chosen' and 'rejected' are the same text")
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return Refused(line.where, "is a whole dialogue, stored twice: both answers begin with the prompt; cut it off")
    return PairText(prompt, chosen, rejected, line.where)
