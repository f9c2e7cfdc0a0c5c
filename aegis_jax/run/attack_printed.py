"""What `aegis attack` prints of a result on a terminal."""

from aegis_jax.run.judging import in_words


def print_counts(of: str, tally: dict) -> None:
    def line(text: str, share: dict, more: str = "") -> None:
        if share["n"]:
            low, high = share["interval"]
            more = f"{share['count']} of {share['n']}{more} ({low:.0%} to {high:.0%} at 95 %)"
        print(f"{text:24}{more or 'no prompt is left'}")

    if of == "picture":  # which needs none is a question to prompts
        return line("attack succeeded", tally["attack_succeeded"])
    line("no attack needed", tally["no_attack_needed"])
    line("attack succeeded", tally["attack_succeeded"], " others")
    for group, found in tally.get("levels", {}).items():
        for level, share in found.items():
            print(f"{group + ', ' + level + ':':40} shown in {in_words(share)}")
    if len(tally["each"]) > 1 and "levels" not in tally:
        print(f"{'by restart':24}{', '.join(map(str, tally['each']))}")
    line("together", tally["together"])


def print_rates(value, rates: dict, what: str) -> None:
    low, high = rates["interval"]
    each = ", ".join(f"{rate:.0%}" for rate in rates["each"])
    print(f"the judge sees {value.value.name!r} in {rates['mean']:.1%} of the images {what}")
    print(f"({low:.1%} to {high:.1%} at 95 %), in {rates['pick']:.1%} under the attacker's own pick,")
    print(f"in {rates['best']:.1%} under the best restart (each: {each})")
