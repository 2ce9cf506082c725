//! Makes sure that the ranks of a group were given the same settings.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_128;

use super::Communicator;
use crate::Error;

impl Communicator {
    /// Makes sure that all ranks of the group were given the same settings: with others a rank calls other collectives,
    /// and nobody knows why, or trains on with other numbers. `settings` is what serde can serialize, as the flags of a
    /// program or what a file of it says, without what may differ (`#[serde(skip)]`). Maps are compared by their keys,
    /// sequences in their order. Collective: 16 bytes of each rank, and more only if some differ.
    ///
    /// ```
    /// use burn_parallel::prelude::*;
    /// use serde::Serialize;
    ///
    /// #[derive(Serialize)]
    /// struct Settings {
    ///     lr: f64,
    ///     clip: Option<f64>,
    /// }
    ///
    /// let error = launch::threads(3).run(|rank| {
    ///     let clip = if rank.rank() == 2 { Some(0.5) } else { None };
    ///     rank.agree_on(&Settings { lr: 0.1, clip })
    /// });
    /// let said = error.unwrap_err().to_string();
    /// assert_eq!(said, "`clip` is 0.5 on rank 2 of group `world`, and null on rank 0: give all ranks the same");
    /// ```
    ///
    /// # Errors
    /// [`Error::Settings`], the same on all ranks, with the first rank whose settings are not those of rank 0, and the
    /// first of these by its name; [`Error::InvalidArgument`] if they cannot be serialized as JSON.
    pub fn agree_on<S: Serialize + ?Sized>(&self, settings: &S) -> Result<(), Error> {
        let mine = named(settings).map_err(|why| Error::invalid("agree_on", format!("no settings: {why}")))?;
        let digest = xxh3_128(&mine);
        let told = self.all_gather(vec![digest as u64, (digest >> 64) as u64])?;
        let (digests, _) = told.as_chunks::<2>();
        let Some(rank) = digests.iter().position(|other| *other != digests[0]) else { return Ok(()) };
        let [theirs, first] = [self.share_bytes(mine.clone(), rank)?, self.share_bytes(mine, 0)?];
        let (name, [value, value_of_0]) = difference(&theirs, &first);
        let error = Error::Settings { group: self.group().clone(), rank, name, value, value_of_0 };
        self.fail(error.clone());
        Err(error)
    }

    /// The bytes of one rank, on all.
    ///
    /// # Errors
    /// Those of [`broadcast`](Self::broadcast).
    pub(crate) fn share_bytes(&self, mut bytes: Vec<u8>, root: usize) -> Result<Vec<u8>, Error> {
        let len = self.broadcast(vec![bytes.len() as u64], root)?[0] as usize;
        bytes.resize(len, 0);
        self.broadcast(bytes, root)
    }
}

/// Each setting by its name, as in `data.overlap`, with its value as JSON; in the order of the names.
type SettingValues = BTreeMap<String, String>;

fn named<S: Serialize + ?Sized>(settings: &S) -> serde_json::Result<Vec<u8>> {
    let mut all = SettingValues::new();
    add(String::new(), serde_json::to_value(settings)?, &mut all);
    serde_json::to_vec(&all)
}

fn add(name: String, value: Value, all: &mut SettingValues) {
    let within = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            fields.into_iter().for_each(|(key, value)| add(within(&key), value, all));
        }
        Value::Array(items) if !items.is_empty() => {
            items.into_iter().enumerate().for_each(|(place, value)| add(format!("{name}[{place}]"), value, all));
        }
        value => drop(all.insert(name, value.to_string())),
    }
}

/// The name of the first setting that differs, and its values.
fn difference(theirs: &[u8], first: &[u8]) -> (String, [String; 2]) {
    // What is no such map came from somebody who is no rank of this program.
    let read = |bytes: &[u8]| serde_json::from_slice::<SettingValues>(bytes).unwrap_or_default();
    let (theirs, first) = (read(theirs), read(first));
    let differs = |name: &&String| theirs.get(*name) != first.get(*name);
    let name = theirs.keys().chain(first.keys()).filter(differs).min().cloned().unwrap_or_default();
    let value = |all: &SettingValues| all.get(&name).cloned().unwrap_or_else(|| "not given".into());
    let values = [value(&theirs), value(&first)];
    (name, values)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde_json::json;

    use super::*;
    use crate::launch;

    /// What two ranks say of their settings.
    fn compared(settings: [Value; 2]) -> Result<(), Error> {
        let both = launch::threads(2).run(|rank| Ok(rank.agree_on(&settings[rank.rank()])));
        both.map(|mut all| all.swap_remove(1)).unwrap_or_else(Err)
    }

    #[test]
    fn the_first_setting_that_differs_is_named_with_both_values() {
        let whole = json!({ "lr": 0.1, "data": { "keep": "pass", "sizes": [1, 2] }, "clip": null });
        assert_eq!(compared([whole.clone(), whole.clone()]), Ok(()));
        for (other, name, values) in [
            (json!({ "lr": 0.2, "data": { "keep": "pass", "sizes": [1, 2] }, "clip": null }), "lr", ["0.2", "0.1"]),
            (
                json!({ "lr": 0.2, "data": { "keep": "step", "sizes": [1, 2] }, "clip": null }),
                "data.keep",
                ["\"step\"", "\"pass\""],
            ),
            (
                json!({ "lr": 0.1, "data": { "keep": "pass", "sizes": [1] }, "clip": null }),
                "data.sizes[1]",
                ["not given", "2"],
            ),
            (json!({ "lr": 0.1, "data": {}, "clip": null }), "data", ["{}", "not given"]),
        ] {
            let Err(Error::Settings { rank: 1, name: found, value, value_of_0, .. }) = compared([whole.clone(), other])
            else {
                panic!("{name} is not found")
            };
            assert_eq!((found.as_str(), [value.as_str(), value_of_0.as_str()]), (name, values));
        }
    }

    /// A map has another order on each rank.
    #[test]
    fn maps_are_compared_by_their_keys() {
        let agreed = launch::threads(2).run(|rank| {
            let mut keys: Vec<u32> = (0..100).collect();
            keys.rotate_left(rank.rank() * 7);
            rank.agree_on(&keys.into_iter().map(|key| (key, key % 3)).collect::<HashMap<_, _>>())
        });
        assert_eq!(agreed, Ok(vec![(), ()]));
    }

    #[test]
    fn what_is_no_map_of_settings_is_no_panic() {
        assert_eq!(difference(b"[1]", b"\xff"), (String::new(), ["not given".into(), "not given".into()]));
    }
}
