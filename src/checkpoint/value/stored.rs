//! Reads a value that was written with its floats as they are, from JSON.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, Error as _, MapAccess, SeqAccess, VariantAccess, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Value};

use super::written::FLOAT;

/// JSON in which an object may stand for a float, which [`Value`] has no place for if it is none of JSON's.
pub(super) struct StoredJson(pub(super) Value);

impl StoredJson {
    fn float(&self) -> Option<f64> {
        let object = self.0.as_object().filter(|object| object.len() == 1)?;
        object.get(FLOAT)?.as_str()?.parse().ok()
    }
}

impl<'de> Deserializer<'de> for StoredJson {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.float() {
            Some(float) => visitor.visit_f64(float),
            None if self.0.is_array() || self.0.is_object() => self.0.deserialize_any(StoredParts(visitor)),
            None => self.0.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.0.deserialize_enum(name, variants, StoredParts(visitor))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

/// Of a list, an object or a variant, whose parts are such JSON as well; and the visitor that is given it.
struct StoredParts<A>(A);

/// A part of it.
fn read<'de, S: DeserializeSeed<'de>, E: serde::de::Error>(seed: S, value: Value) -> Result<S::Value, E> {
    seed.deserialize(StoredJson(value)).map_err(E::custom)
}

impl<'de, V: Visitor<'de>> Visitor<'de> for StoredParts<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(StoredParts(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(StoredParts(object))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.0.visit_enum(StoredParts(variant))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for StoredParts<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element()?.map(|value| read(seed, value)).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for StoredParts<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.0.next_key_seed(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        read(seed, self.0.next_value()?)
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for StoredParts<A> {
    type Error = A::Error;
    type Variant = StoredParts<A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), A::Error> {
        let (name, variant) = self.0.variant_seed(seed)?;
        Ok((name, StoredParts(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for StoredParts<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        read(seed, self.0.newtype_variant()?)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, A::Error> {
        StoredJson(self.0.newtype_variant()?).deserialize_any(visitor).map_err(A::Error::custom)
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], visitor: V) -> Result<V::Value, A::Error> {
        StoredJson(self.0.newtype_variant()?).deserialize_any(visitor).map_err(A::Error::custom)
    }
}
