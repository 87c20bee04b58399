// Copied text is the original text: the WORD JOINER that keeps chat text from being markup (app/services/conversation.py)
// is removed.
const plain = (text) => String(text).replaceAll("\u2060", "");
document.addEventListener("copy", (event) => {
  const text = String(document.getSelection());
  if (!text.includes("\u2060")) return;
  event.clipboardData.setData("text/plain", plain(text));
  event.preventDefault();
});
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) => write(plain(text));
}
