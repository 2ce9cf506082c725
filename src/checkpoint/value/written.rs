//! Writes floats exactly: those that JSON has no number for, and those that readers of JSON would round, as texts.

use serde::ser::{
    Serialize, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
    SerializeTupleStruct, SerializeTupleVariant, Serializer,
};

/// The key of an object that stands for a float: one that JSON has no number for, or that its readers would round.
pub(super) const FLOAT: &str = "$float";

/// A serializer of JSON whose floats come back as they are.
pub(super) struct Exact<S>(pub(super) S);

/// What is within a value.
struct Within<'a, T: ?Sized>(&'a T);

impl<T: Serialize + ?Sized> Serialize for Within<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(Exact(serializer))
    }
}

/// Whether readers of JSON take the number for this float.
fn is_exact(float: f64) -> bool {
    let back = serde_json::Number::from_f64(float).map(|number| serde_json::from_str::<f64>(&number.to_string()));
    matches!(back, Some(Ok(back)) if back.to_bits() == float.to_bits())
}

macro_rules! plain {
    ($($name:ident($($arg:ident: $of:ty),*);)*) => {
        $(fn $name(self, $($arg: $of),*) -> Result<S::Ok, S::Error> {
            self.0.$name($($arg),*)
        })*
    };
}

macro_rules! with_value {
    ($($name:ident($($arg:ident: $of:ty),*);)*) => {
        $(fn $name<T: Serialize + ?Sized>(self, $($arg: $of,)* value: &T) -> Result<S::Ok, S::Error> {
            self.0.$name($($arg,)* &Within(value))
        })*
    };
}

macro_rules! compound {
    ($($name:ident($($arg:ident: $of:ty),*) -> $compound:ident;)*) => {
        $(fn $name(self, $($arg: $of),*) -> Result<Self::$compound, S::Error> {
            self.0.$name($($arg),*).map(Exact)
        })*
    };
}

impl<S: Serializer> Serializer for Exact<S> {
    type Ok = S::Ok;
    type Error = S::Error;
    type SerializeSeq = Exact<S::SerializeSeq>;
    type SerializeTuple = Exact<S::SerializeTuple>;
    type SerializeTupleStruct = Exact<S::SerializeTupleStruct>;
    type SerializeTupleVariant = Exact<S::SerializeTupleVariant>;
    type SerializeMap = Exact<S::SerializeMap>;
    type SerializeStruct = Exact<S::SerializeStruct>;
    type SerializeStructVariant = Exact<S::SerializeStructVariant>;

    plain! {
        serialize_bool(value: bool);
        serialize_i8(value: i8);
        serialize_i16(value: i16);
        serialize_i32(value: i32);
        serialize_i64(value: i64);
        serialize_i128(value: i128);
        serialize_u8(value: u8);
        serialize_u16(value: u16);
        serialize_u32(value: u32);
        serialize_u64(value: u64);
        serialize_u128(value: u128);
        serialize_char(value: char);
        serialize_str(value: &str);
        serialize_bytes(value: &[u8]);
        serialize_none();
        serialize_unit();
        serialize_unit_struct(name: &'static str);
        serialize_unit_variant(name: &'static str, number: u32, variant: &'static str);
    }

    with_value! {
        serialize_some();
        serialize_newtype_struct(name: &'static str);
        serialize_newtype_variant(name: &'static str, number: u32, variant: &'static str);
    }

    compound! {
        serialize_seq(len: Option<usize>) -> SerializeSeq;
        serialize_tuple(len: usize) -> SerializeTuple;
        serialize_tuple_struct(name: &'static str, len: usize) -> SerializeTupleStruct;
        serialize_tuple_variant(name: &'static str, number: u32, variant: &'static str, len: usize) -> SerializeTupleVariant;
        serialize_map(len: Option<usize>) -> SerializeMap;
        serialize_struct(name: &'static str, len: usize) -> SerializeStruct;
        serialize_struct_variant(name: &'static str, number: u32, variant: &'static str, len: usize) -> SerializeStructVariant;
    }

    fn serialize_f32(self, float: f32) -> Result<S::Ok, S::Error> {
        self.serialize_f64(float.into())
    }

    fn serialize_f64(self, float: f64) -> Result<S::Ok, S::Error> {
        if is_exact(float) {
            return self.0.serialize_f64(float);
        }
        let mut object = self.0.serialize_map(Some(1))?;
        object.serialize_entry(FLOAT, &format!("{float:?}"))?;
        object.end()
    }
}

macro_rules! parts {
    ($($compound:ident: $($name:ident($($key:ident: $of:ty)?)),*;)*) => {$(
        impl<S: $compound> $compound for Exact<S> {
            type Ok = S::Ok;
            type Error = S::Error;

            $(fn $name<T: Serialize + ?Sized>(&mut self, $($key: $of,)? value: &T) -> Result<(), S::Error> {
                self.0.$name($($key,)? &Within(value))
            })*

            fn end(self) -> Result<S::Ok, S::Error> {
                self.0.end()
            }
        }
    )*};
}

parts! {
    SerializeSeq: serialize_element();
    SerializeTuple: serialize_element();
    SerializeTupleStruct: serialize_field();
    SerializeTupleVariant: serialize_field();
    SerializeStruct: serialize_field(key: &'static str);
    SerializeStructVariant: serialize_field(key: &'static str);
}

impl<S: SerializeMap> SerializeMap for Exact<S> {
    type Ok = S::Ok;
    type Error = S::Error;

    // JSON has texts there alone.
    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), S::Error> {
        self.0.serialize_key(key)
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), S::Error> {
        self.0.serialize_value(&Within(value))
    }

    fn end(self) -> Result<S::Ok, S::Error> {
        self.0.end()
    }
}
