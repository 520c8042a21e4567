//! Which names somebody may have meant who wrote another one.

use std::collections::BTreeSet;

/// Longer ones are no typos, and the distance costs the product of the lengths. In bytes.
const LONGEST: usize = 128;

/// At most so many of the known names, the one that is most like the given one first; none if that is too long to be a name.
#[must_use]
pub fn most_alike(
    given: &str,
    known: impl IntoIterator<Item = String>,
    most: usize,
) -> Vec<String> {
    if given.len() > LONGEST {
        return Vec::new();
    }
    let known: BTreeSet<String> = known.into_iter().filter(|name| name.len() <= LONGEST).collect();
    let mut found: Vec<_> =
        known.into_iter().map(|name| (edit_distance(given, &name), name)).collect();
    found.sort_unstable();
    found.into_iter().take(most).map(|(_, name)| name).collect()
}

/// How many letters must be put in, taken out or replaced; case does not count.
pub(crate) fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.to_lowercase(), b.to_lowercase());
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (line, x) in a.chars().enumerate() {
        let mut left = line + 1;
        let mut next = vec![left];
        for (y, above) in b.chars().zip(row.windows(2)) {
            let [diagonal, above] = above else { continue };
            left = (diagonal + usize::from(x != y)).min(above + 1).min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_alike_come_first_and_each_once() {
        let known = ["shop/checkout", "shop/web", "payments/ledger", "shop/check", "shop/web"];
        let nearest = |given: &str| most_alike(given, known.map(str::to_owned), 3);
        assert_eq!(nearest("shop/chekout"), ["shop/checkout", "shop/check", "shop/web"]);
        assert_eq!(nearest("Shop/Web"), ["shop/web", "shop/check", "shop/checkout"]);
        assert_eq!(nearest(&"x".repeat(LONGEST + 1)), [""; 0]);
        assert_eq!(most_alike("a", [], 3), [""; 0]);
    }
}
