//! Serde for paths and arguments: a string where the bytes are UTF-8, else an array of
//! bytes, so that no name a file system allows is refused or altered.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

struct Borrowed<'a>(&'a OsStr);

impl Serialize for Borrowed<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => serializer.collect_seq(self.0.as_bytes()),
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Owned {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<Owned> for OsString {
    fn from(owned: Owned) -> Self {
        match owned {
            Owned::Text(text) => text.into(),
            Owned::Bytes(bytes) => OsString::from_vec(bytes),
        }
    }
}

/// One path or word.
pub(crate) fn serialize<T: AsRef<OsStr>, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    Borrowed(value.as_ref()).serialize(serializer)
}

/// One path or word.
pub(crate) fn deserialize<'de, T: From<OsString>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(OsString::from(Owned::deserialize(deserializer)?).into())
}

/// A list.
pub(crate) mod list {
    use super::*;

    pub(crate) fn serialize<T: AsRef<OsStr>, S: Serializer>(
        values: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|value| Borrowed(value.as_ref())))
    }

    pub(crate) fn deserialize<'de, T: From<OsString>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<T>, D::Error> {
        Ok(Vec::<Owned>::deserialize(deserializer)?.into_iter().map(|o| OsString::from(o).into()).collect())
    }
}

/// An optional one.
pub(crate) mod option {
    use super::*;

    pub(crate) fn serialize<T: AsRef<OsStr>, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.as_ref().map(|value| Borrowed(value.as_ref())).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, T: From<OsString>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        Ok(Option::<Owned>::deserialize(deserializer)?.map(|o| OsString::from(o).into()))
    }
}

/// Variables with their values.
pub(crate) mod pairs {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(
        pairs: &[(OsString, OsString)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(pairs.iter().map(|(k, v)| (Borrowed(k), Borrowed(v))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(OsString, OsString)>, D::Error> {
        Ok(Vec::<(Owned, Owned)>::deserialize(deserializer)?
            .into_iter()
            .map(|(k, v)| (k.into(), v.into()))
            .collect())
    }
}

/// Variables set or taken away.
pub(crate) mod changes {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(
        pairs: &[(OsString, Option<OsString>)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(pairs.iter().map(|(k, v)| (Borrowed(k), v.as_deref().map(Borrowed))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(OsString, Option<OsString>)>, D::Error> {
        Ok(Vec::<(Owned, Option<Owned>)>::deserialize(deserializer)?
            .into_iter()
            .map(|(k, v)| (k.into(), v.map(OsString::from)))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sample {
        #[serde(with = "super")]
        path: PathBuf,
        #[serde(with = "super::list")]
        args: Vec<OsString>,
        #[serde(with = "super::option")]
        none: Option<PathBuf>,
        #[serde(with = "super::changes")]
        env: Vec<(OsString, Option<OsString>)>,
    }

    #[test]
    fn names_that_are_not_utf8_survive_json() {
        let odd = OsString::from_vec(vec![b'a', 0xff]);
        let sample = Sample {
            path: "/plain".into(),
            args: vec!["x".into(), odd.clone()],
            none: None,
            env: vec![("K".into(), Some(odd)), ("GONE".into(), None)],
        };
        let json = serde_json::to_string(&sample).unwrap();
        assert_eq!(
            json,
            r#"{"path":"/plain","args":["x",[97,255]],"none":null,"env":[["K",[97,255]],["GONE",null]]}"#
        );
        assert_eq!(serde_json::from_str::<Sample>(&json).unwrap(), sample);
    }
}
