//! Compresses many parameter paths into few words, for messages.

/// Paths that differ in numbers only.
struct PathGroup<'a> {
    names: Vec<&'a str>,
    /// The lowest and the highest number at the place of each name, where it is one.
    ranges: Vec<Option<(usize, usize)>>,
}

impl<'a> PathGroup<'a> {
    fn of(names: Vec<&'a str>) -> Self {
        let ranges = names.iter().map(|name| name.parse().ok().map(|number| (number, number))).collect();
        Self { names, ranges }
    }

    fn has(&self, other: &Self) -> bool {
        let mut names = self.names.iter().zip(&other.names).zip(self.ranges.iter().zip(&other.ranges));
        self.names.len() == other.names.len() && names.all(|((a, b), (x, y))| a == b || x.is_some() && y.is_some())
    }

    fn grow(&mut self, other: &Self) {
        for (range, more) in self.ranges.iter_mut().zip(&other.ranges) {
            *range = range.zip(*more).map(|(range, more)| (range.0.min(more.0), range.1.max(more.1)));
        }
    }

    fn show(&self) -> String {
        let names = self.names.iter().zip(&self.ranges).map(|(name, range)| match range {
            Some((low, high)) if low != high => format!("{{{low}-{high}}}"),
            _ => (*name).to_owned(),
        });
        format!("`{}`", names.collect::<Vec<_>>().join("."))
    }
}

/// The paths, of which those that differ in numbers only are one: `layers.{0-31}.norm.gamma`.
pub(crate) fn compress_paths<'a>(paths: impl IntoIterator<Item = &'a str>) -> String {
    let mut groups: Vec<PathGroup<'a>> = Vec::new();
    for path in paths {
        let one = PathGroup::of(path.split('.').collect());
        match groups.iter_mut().find(|group| group.has(&one)) {
            Some(group) => group.grow(&one),
            None => groups.push(one),
        }
    }
    groups.iter().map(PathGroup::show).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::compress_paths;

    #[test]
    fn layers_are_named_once() {
        let paths =
            ["words.weight", "layers.0.up.weight", "layers.0.up.bias", "layers.1.up.weight", "layers.1.up.bias"];
        assert_eq!(compress_paths(paths), "`words.weight`, `layers.{0-1}.up.weight`, `layers.{0-1}.up.bias`");
        assert_eq!(compress_paths(["experts.3.w", "w"]), "`experts.3.w`, `w`");
    }
}
