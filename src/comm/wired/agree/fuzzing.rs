//! What a rank brings to a collective, out of any bytes.

use super::Post;

/// What is understood is the same when it is written and read again.
pub fn post(bytes: &[u8]) {
    if let Some(post) = Post::from_bytes(bytes) {
        let written = post.to_bytes();
        let again = Post::from_bytes(&written).map(Post::to_bytes);
        assert_eq!(again, Some(written), "{post:?}");
        // What is worked out from the calls of others, and printed.
        let extent = post.call.extent;
        assert!(extent.elements() <= extent.rows().max(1) * extent.width().max(1));
        let _ = (extent.with_rows(extent.rows()), post.call.digest(), post.call.to_string());
    }
}
