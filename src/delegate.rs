//! Implements `Module` for a wrapper by delegating to one of its fields.

/// Implements `Module` and `Display` for a wrapper by delegating to one field: paths and parameters are those of the
/// field. `valid` keeps the other fields. A function of [`optimizer_mapper`](crate::optimizer_mapper) may look at
/// mappers first.
macro_rules! module_of_field {
    ($wrapper:ident<$inner:ident: $bound:ident>, $field:ident $(, $before_map:ident)?) => {
        impl<$inner: std::fmt::Display> std::fmt::Display for $wrapper<$inner> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.$field.fmt(f)
            }
        }

        impl<$inner: $bound> burn::module::Module for $wrapper<$inner> {
            fn collect_devices(&self, devices: burn::module::Devices) -> burn::module::Devices {
                self.$field.collect_devices(devices)
            }

            fn fork(self, device: &burn::tensor::Device) -> Self {
                Self { $field: self.$field.fork(device), ..self }
            }

            fn to_device(self, device: &burn::tensor::Device) -> Self {
                Self { $field: self.$field.to_device(device), ..self }
            }

            fn train(self) -> Self {
                Self { $field: self.$field.train(), ..self }
            }

            fn valid(&self) -> Self {
                Self { $field: self.$field.valid(), ..self.clone() }
            }

            fn materialize(self) -> Self {
                Self { $field: self.$field.materialize(), ..self }
            }

            fn visit<V: burn::module::ModuleVisitor>(&self, visitor: &mut V) {
                $crate::nesting::visited(stringify!($wrapper));
                self.$field.visit(visitor);
            }

            fn map<V: burn::module::ModuleMapper>(self, mapper: &mut V) -> Self {
                $($crate::optimizer_mapper::$before_map::<V>(stringify!($wrapper));)?
                Self { $field: self.$field.map(mapper), ..self }
            }
        }
    };
}
pub(crate) use module_of_field;
