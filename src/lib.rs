#![allow(missing_docs)] // replaced by the lead
